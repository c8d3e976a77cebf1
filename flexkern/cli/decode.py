"""``flexkern decode``: latents that a render left, into a video."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flexkern.checks import require
from flexkern.cli.errors import note, refuse, refusing
from flexkern.cli.flags import RATE, option
from flexkern.render import status
from flexkern.render.choices import DEMO
from flexkern.render.encoding import STDOUT, Form

if TYPE_CHECKING:
    from flexkern.render import Encoding
    from flexkern.render.decoding import HeldLatents


@dataclass(kw_only=True)
class Decode:
    """Decode latents, as `flexkern render --latents` writes them, to a video; what a stopped render left will do."""

    latents: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LATENTS")]
    """file of latents"""
    out: Annotated[Path, option("FILE")] = Path("video.mp4")
    """file to write: .mp4 (H.264), .mov (ProRes 422 HQ), FOLDER/%06d.png for a picture each, or - for stdout; default:
    video.mp4"""
    vae: Annotated[Path | None, option("PATH")] = None
    """Wan2.1_VAE.pth, a diffusers vae folder, a tiny decoder (taew2_1), or the folder of a model that has one"""
    fps: Annotated[float | None, option("RATE"), RATE] = None
    """pictures per second of the video; default: the model's, 16"""
    crf: Annotated[int, tyro.conf.arg(metavar="INT")] = 18
    """quality of H.264, 0 (lossless) to 51"""
    format: Annotated[Form | None, option("NAME")] = None
    """mp4, mov or png, as --out is named; for stdout mp4 (fragmented), y4m or rgb24; default: by --out, stdout: mp4"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace a file that exists"""
    device: Annotated[str | None, option("NAME")] = None
    """cpu, cuda or cuda:N; default: the first GPU, or the CPU if there is none"""
    threads: Annotated[int | None, option("INT")] = None
    """number of CPU threads that torch uses; default: torch's own choice"""
    progress: bool = True
    """show how far it is"""

    def run(self) -> int:
        with refusing(ValueError, OSError, NotImplementedError):
            from flexkern.render import Encoding, validate_form, validate_new, validate_output
            from flexkern.render.sidecar import sidecar_path
            from flexkern.render.target import validate_targets

            encoding = Encoding(fps=self.fps, crf=self.crf, format=self.format)
            validate_output(self.out, encoding)
            written = [] if self.out == STDOUT else [self.out, sidecar_path(self.out)]
            validate_targets(written, {"LATENTS": self.latents} | ({} if self.vae is None else {"--vae": self.vae}))
            for path in written[:1]:
                validate_new(path, overwrite=self.overwrite)
            require(self.threads is None or self.threads >= 1, f"--threads must be at least 1, got {self.threads}")
            from flexkern.model.intact import require_there
            from flexkern.render.decoding import inspect_latents

            held = inspect_latents(self.latents)
            if self.vae is not None:
                require_there(self.vae, "VAE")

            import torch

            from flexkern.pipeline import default_device, validate_device

            device = self.device or default_device()
            validate_device(device, "--device")
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            decoder, spatial = self.open_decoder(held, device)
            height, width = (spatial * side for side in held.size)
            validate_form(width, height, held.fps, encoding, self.out)
        return self.carry_out(held, decoder(), device, encoding)

    def open_decoder(self, held: "HeldLatents", device: str) -> tuple[Callable[[], Any], int]:
        """What turns the latents into pictures, and how much larger these are, either way.

        Raises ValueError where it does not fit them, or none is named.
        """
        import torch

        from flexkern.model.find import find_part
        from flexkern.model.tiny_decoder import load_tiny_decoder, validate_tiny_decoder
        from flexkern.model.vae import load_vae, validate_vae

        if held.model == DEMO and self.vae is None:
            from flexkern import demo

            return demo.PixelDecoder, demo.ZOOM
        require(self.vae is not None, f"{held.path} needs a VAE: give --vae PATH (Wan2.1_VAE.pth or a vae folder)")
        assert self.vae is not None
        kind, path = find_part(self.vae, ("VAE", "tiny VAE"))
        form = validate_vae(path) if kind == "VAE" else validate_tiny_decoder(path)
        told = f"{path} decodes latents of {form.channels} channels, {held.path} has {held.channels}"
        require(form.channels == held.channels, told)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16  # as a render has it
        if kind == "VAE":
            return load_vae(path, device=device, dtype=dtype).decoder, form.spatial
        return load_tiny_decoder(path, device=device, dtype=dtype), form.spatial

    def carry_out(self, held: "HeldLatents", decoder: Any, device: str, encoding: "Encoding") -> int:
        """Write the video, and say how that ended. Returns the exit status."""
        from flexkern.finite import NotFiniteError
        from flexkern.render import stoppable
        from flexkern.render.decoding import decode_latents, describe
        from flexkern.render.meter import Meter
        from flexkern.render.sidecar import write_sidecar

        began, piped = time.perf_counter(), self.out == STDOUT
        with stoppable() as signals, Meter("latent frames", shown=self.progress) as meter:
            meter.begin(held.frames)
            told = lambda frames: meter.advance(frames - meter.made)
            stream = sys.stdout.buffer if piped else None
            try:
                made = decode_latents(
                    held, decoder, self.out, device=device, encoding=encoding, stream=stream, told=told
                )  # fmt: skip
                if not piped:
                    about = describe(
                        held, self.out, pictures=made, encoding=encoding, decoder=self.vae, device=device,
                        seconds=time.perf_counter() - began,
                    )  # fmt: skip
                    write_sidecar(self.out, about)
            except BrokenPipeError:
                raise
            except NotFiniteError as error:
                refuse(str(error), status.FAILED)
            except OSError as error:
                refuse(f"{error}; the latents are as they were", status.NOTHING_KEPT)
            except KeyboardInterrupt:
                note("interrupted: the latents are as they were")
                return status.SIGNAL + signals[0]
        short = f" of {held.pictures} ordered" if held.pictures is not None and made < held.pictures else ""
        length = f"{made} pictures{short}, {made / float(encoding.rate(held.fps)):.1f} s"
        print(f"{self.out}: {length}", file=sys.stderr if piped else sys.stdout)
        return status.DONE
