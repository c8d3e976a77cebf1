"""``flexkern serve``: flags become a model, limits and a door, and a server of them."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from flexkern.checks import require
from flexkern.cli.errors import note, refusing
from flexkern.cli.flags import option
from flexkern.render import status
from flexkern.render.choices import PROMPT, is_family

if TYPE_CHECKING:
    from flexkern.render import JobSpec
    from flexkern.serve.server import Door

TOKEN = "FLEXKERN_TOKEN"  # environment variable


@dataclass(kw_only=True)
class Serve:
    """Make the videos that are asked for over HTTP, one after the other: the Videos API, and a page at its address."""

    dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """folder of the videos, made if needed; a server that is started again there goes on with what was not finished"""
    model: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "demo"
    """demo, a file of its form, or for --weights: self-forcing, longlive, causvid, rolling-forcing, reward-forcing,
    wan-diffusers"""
    weights: Annotated[Path | None, option("PATH")] = None
    """weight file or folder, in any published layout; a VAE and a text encoder beside the weights are found"""
    vae: Annotated[Path | None, option("PATH")] = None
    """Wan2.1_VAE.pth, a diffusers vae folder, or a tiny decoder (taew2_1); default: the one beside the weights"""
    text_encoder: Annotated[Path | None, option("PATH")] = None
    """models_t5_umt5-xxl-enc-bf16.pth or a transformers folder of UMT5; default: the one beside the weights"""
    tokenizer: Annotated[Path | None, option("PATH")] = None
    """folder of the tokenizer; default: the one beside the text encoder"""
    lora: Annotated[tuple[Path, ...], option("PATH"), tyro.conf.UseAppendAction] = ()
    """LoRA to add to the transformer, a file or a folder; may be given several times"""
    lora_scale: Annotated[tuple[float, ...], option("FLOAT"), tyro.conf.UseAppendAction] = ()
    """factor on the LoRA's own scale; default: 1; once for each --lora, in their order"""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, option("NAME")] = None
    """dtype of the transformer's weights: bfloat16, float16 or float32; default: bfloat16"""
    size: Annotated[str | None, option("HEIGHTxWIDTH")] = None
    """size of the pictures in pixels, height first; default: as the checkpoint was trained"""
    preset: Annotated[str | None, option("NAME")] = None
    """method where a request names none; default: flex, or the one that --model brings"""
    backend: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """implementation of attention, one of those that `flexkern doctor` lists"""
    device: Annotated[tuple[str, ...], option("NAME"), tyro.conf.UseAppendAction] = ()
    """cpu, cuda or cuda:N, with a worker on each that is given; default: the first GPU, or the CPU if there is none"""
    threads: Annotated[int | None, option("INT")] = None
    """number of CPU threads of each worker; default: one for the demo, else torch's own choice"""
    host: Annotated[str, tyro.conf.arg(metavar="NAME|ADDRESS")] = "127.0.0.1"
    """where to listen; another address than one of this machine alone needs a token"""
    port: Annotated[int, tyro.conf.arg(metavar="INT")] = 8000
    """port to listen at; 0 takes one that is free"""
    token_file: Annotated[Path | None, option("FILE")] = None
    """file with the token that requests need; or the environment variable FLEXKERN_TOKEN"""
    without_token: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """let everybody in who can reach --host"""
    queue: Annotated[int, tyro.conf.arg(metavar="INT")] = 16
    """number of videos that may wait; whoever asks for another is told to come again"""
    max_seconds: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 120.0
    """longest video that may be asked for, in seconds"""
    checkpoint_seconds: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 30.0
    """seconds of a render that a kill may cost; 0 for a checkpoint after every chunk"""
    max_window: Annotated[int, tyro.conf.arg(metavar="INT")] = 48
    """most latent frames that a request may have kept in memory"""

    def run(self) -> int:
        with refusing(*status.BAD):
            require(0 <= self.checkpoint_seconds < math.inf, "--checkpoint-seconds must be 0 or more, and have an end")
            from flexkern.render.assembly import chosen_family, chosen_weights, validate_inputs

            chosen_weights(spec := self.base())
            validate_inputs(spec)
            door = self.door()

            from flexkern.render.worker import Worker
            from flexkern.serve.served import Limits, Served
            from flexkern.serve.server import run_server

            limits = Limits(seconds=float(self.max_seconds), queued=self.queue, window=self.max_window)
            example = None if is_family(spec.model) else PROMPT
            served = Served(base=spec, family=chosen_family(spec, None), limits=limits, example=example)
            devices = self.device or (None,)
            workers = [Worker(device=device, threads=self.threads or 0) for device in devices]
            self.dir.mkdir(parents=True, exist_ok=True)
            workers[0].check(served.trial(self.dir / "trial.mp4"))
            run_server(
                served, self.dir, door, check=workers[0].check, devices=devices, threads=self.threads or 0,
                every=self.checkpoint_seconds, tell=note,
                up=lambda address: print(f"flexkern: {served.name} at {address} (videos in {self.dir})", flush=True),
            )  # fmt: skip
        return 0

    def door(self) -> "Door":
        """Where to listen, and the token. Raises ValueError where the token will not do, or is needed."""
        from flexkern.serve.server import Door

        token = os.environ.get(TOKEN)
        if self.token_file is not None:
            if token is not None:
                raise ValueError(f"give --token-file or {TOKEN}, not both")
            token = self.token_file.read_text(encoding="utf-8")
        try:
            return Door(host=self.host, port=self.port, token=token, open=self.without_token)
        except ValueError as error:
            said = str(error).replace("give a token", f"give --token-file FILE or {TOKEN}")
            raise ValueError(said.replace("allow all of them in", "--without-token to let everybody in")) from None

    def base(self) -> "JobSpec":
        """The model as a job says it. Raises ValueError for a field that will not do."""
        from flexkern.render import JobSpec

        whole = lambda path: None if path is None else path.absolute()
        model = str(Path(self.model).absolute()) if Path(self.model).is_file() else self.model
        return JobSpec(
            model=model,
            weights=whole(self.weights),
            vae=whole(self.vae),
            text_encoder=whole(self.text_encoder),
            tokenizer=whole(self.tokenizer),
            lora=tuple(path.absolute() for path in self.lora),
            lora_scale=self.lora_scale,
            dtype=self.dtype,
            size=self.size,
            preset=self.preset,
            backend=self.backend,
            threads=self.threads,
        )
