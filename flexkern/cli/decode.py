"""``flexkern decode``: latents that a render left, into a video."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flexkern.checks import require
from flexkern.cli.errors import note, refuse, refusing
from flexkern.cli.flags import option
from flexkern.render import status
from flexkern.render.choices import DEMO

if TYPE_CHECKING:
    from flexkern.render.decoding import HeldLatents


@dataclass(kw_only=True)
class Decode:
    """Decode latents, as `flexkern render --latents` writes them, to a video; what a stopped render left will do."""

    latents: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LATENTS")]
    """file of latents"""
    out: Annotated[Path, option("FILE")] = Path("video.mp4")
    """file to write, H.264 in MP4; default: video.mp4"""
    vae: Annotated[Path | None, option("PATH")] = None
    """Wan2.1_VAE.pth, a diffusers vae folder, a tiny decoder (taew2_1), or the folder of a model that has one"""
    fps: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 16.0
    """pictures per second"""
    crf: Annotated[int, tyro.conf.arg(metavar="INT")] = 18
    """quality of H.264, 0 (lossless) to 51"""
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
            from flexkern.render import validate_new, validate_target

            validate_target(self.out)
            validate_new(self.out, overwrite=self.overwrite)
            require(self.threads is None or self.threads >= 1, f"--threads must be at least 1, got {self.threads}")
            from flexkern.render.decoding import inspect_latents

            held = inspect_latents(self.latents)

            import torch

            from flexkern.pipeline import validate_device

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            validate_device(device, "--device")
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            decoder = self.open_decoder(held, device)
        return self.carry_out(held, decoder(), device)

    def open_decoder(self, held: "HeldLatents", device: str) -> Callable[[], Any]:
        """What turns the latents into pictures. Raises ValueError where it does not fit them, or none is named."""
        import torch

        from flexkern.model.find import find_part
        from flexkern.model.tiny_decoder import load_tiny_decoder, validate_tiny_decoder
        from flexkern.model.vae import load_vae, validate_vae

        if held.model == DEMO and self.vae is None:
            from flexkern.demo import PixelDecoder

            return PixelDecoder
        require(self.vae is not None, f"{held.path} needs a VAE: give --vae PATH (Wan2.1_VAE.pth or a vae folder)")
        assert self.vae is not None
        kind, path = find_part(self.vae, ("VAE", "tiny VAE"))
        form = validate_vae(path) if kind == "VAE" else validate_tiny_decoder(path)
        told = f"{path} decodes latents of {form.channels} channels, {held.path} has {held.channels}"
        require(form.channels == held.channels, told)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16  # as a render has it
        if kind == "VAE":
            return load_vae(path, device=device, dtype=dtype).decoder
        return load_tiny_decoder(path, device=device, dtype=dtype)

    def carry_out(self, held: "HeldLatents", decoder: Any, device: str) -> int:
        """Write the video, and say how that ended. Returns the exit status."""
        from tqdm import tqdm

        from flexkern.render import stoppable
        from flexkern.render.decoding import decode_latents

        with stoppable() as signals, tqdm(total=held.frames, unit=" latent frames", disable=not self.progress) as bar:
            told = lambda frames: bar.update(frames - bar.n)
            try:
                made = decode_latents(
                    held, decoder, self.out, device=device, fps=self.fps, crf=self.crf, told=told
                )  # fmt: skip
            except OSError as error:
                refuse(f"{error}; the latents are as they were", status.NOTHING_KEPT)
            except KeyboardInterrupt:
                note("interrupted: the latents are as they were")
                return status.SIGNAL + signals[0]
        short = f" of {held.pictures} ordered" if held.pictures is not None and made < held.pictures else ""
        print(f"{self.out}: {made} pictures{short}, {made / self.fps:.1f} s")
        return status.DONE
