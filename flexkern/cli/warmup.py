"""``flexkern warmup``: compile what a render will launch, and find the best tile, before somebody waits for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from flexkern.checks import require
from flexkern.cli.errors import note, refusing
from flexkern.cli.flags import Flags, option
from flexkern.cli.policies import chosen_overrides
from flexkern.model.intact import require_there
from flexkern.policies import get_preset
from flexkern.render.choices import DEMO, base_preset, is_family

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.kernels.compiles import Compiled
    from flexkern.model.families import Family
    from flexkern.model.wan import WanConfig

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(kw_only=True)
class Warmup:
    """Compile every kernel that a render will launch on this machine's GPU, for a model, a size and a preset."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = DEMO
    """demo, a file of its form, or how --weights or --config are run: self-forcing, longlive, causvid,
    rolling-forcing, reward-forcing, wan-diffusers"""
    weights: Annotated[Path | None, option("PATH")] = None
    """weight file or folder of the model; only its header is read"""
    config: Annotated[Literal["1.3B", "14B"] | None, option("NAME")] = None
    """sizes of Wan 2.1, in place of --weights: 1.3B or 14B"""
    dtype: Annotated[Dtype | None, option("NAME")] = None
    """dtype of the transformer's weights: bfloat16, float16 or float32; default: bfloat16"""
    size: Annotated[str | None, option("HEIGHTxWIDTH")] = None
    """size of the pictures in pixels, height first; default: as the checkpoint was trained"""
    chunk: Annotated[int | None, option("INT")] = None
    """number of latent frames denoised together; default: as the checkpoint was trained"""
    first_chunk: Annotated[int | None, option("INT")] = None
    """number of latent frames in the first chunk; default: as in the others"""
    preset: Annotated[str | None, option("NAME")] = None
    """method of horizon extension, see `flexkern presets`; default: flex, or the one that --model brings"""
    device: Annotated[str | None, option("NAME")] = None
    """cuda or cuda:N; default: the first GPU"""
    tune: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """first time the tiles of the portable attention kernel, and keep the fastest for this GPU and Triton"""

    def run(self) -> int:
        with refusing(ValueError, OSError, NotImplementedError):
            base = base_preset(self.preset, self.model, None)
            preset = get_preset(base.name).override(chosen_overrides(self, base, None))
            require(self.config is None or self.weights is None, "give --config or --weights, not both")
            if self.weights is not None:
                require_there(self.weights, "checkpoint")
            device = self.chosen_device()
            config, family, dtype = self.sizes(device)

            import torch

            from flexkern.warmup import decode, live, stand_in, tune

            engine = stand_in(config, family, dtype=getattr(torch, dtype), device=device, backend="triton")
            heads = f"{config.num_heads} heads of {config.head_dim}"
            high, wide = family.picture_size
            note(f"{heads}, {dtype}, {high}x{wide}, chunks of {family.chunk}, preset {preset.name}")
            note(str(engine.backend_choice))
            if self.tune:
                tune(engine, preset, tell=note)
                engine = stand_in(config, family, dtype=getattr(torch, dtype), device=device, backend="triton")

            from flexkern.kernels.compiles import watch_compiles

            with watch_compiles(lambda one: note(told(one))) as compiled:
                live(engine, preset)
                if not self.is_demo:
                    decode(family, dtype=getattr(torch, dtype), device=device)
                torch.cuda.synchronize(device)
            print(summary(compiled))
        return 0

    def chosen_device(self) -> str:
        """The GPU. Raises ValueError where nothing can be compiled for one."""
        import torch

        from flexkern.backends import runs_in_interpreter, unfit_triton
        from flexkern.pipeline import validate_device

        if why := unfit_triton():
            raise ValueError(f"nothing can be compiled: {why}")
        if runs_in_interpreter():
            raise ValueError("TRITON_INTERPRET is set: Triton interprets its kernels, and nothing compiles")
        if not torch.cuda.is_available():
            raise ValueError(f"kernels are compiled for a CUDA GPU, and torch {torch.__version__} sees none")
        device = self.device or "cuda"
        validate_device(device, "--device")
        require(device != "cpu", "kernels are compiled for a CUDA GPU, got --device cpu")
        return device

    @property
    def is_demo(self) -> bool:
        """Whether the model is the demo's, which makes pictures itself."""
        return not is_family(self.model) and self.config is None

    def sizes(self, device: str) -> "tuple[WanConfig, Family, Dtype]":
        """Sizes of the model, how it is run, and the dtype of its weights."""
        from flexkern import demo
        from flexkern.model.families import FAMILIES
        from flexkern.model.wan import CONFIGS
        from flexkern.pipeline import Checkpoint, check

        if self.is_demo:
            for name in ("dtype", "size", "chunk", "first_chunk"):
                require(getattr(self, name) is None, f"--{name.replace('_', '-')} is for checkpoints, not for the demo")
            path = self.weights if self.model == DEMO else Path(self.model)
            demo.validate_weights(path or demo.WEIGHTS)
            engine: Engine = demo.load_engine(path or demo.WEIGHTS, backend="triton", device=device)
            return engine.model.config, demo.family(), "float32"
        family = FAMILIES["self-forcing" if self.model == DEMO else self.model]
        if (size := Flags(size=self.size).read_size()) is not None:
            family = family.override(size=family.latent_size(*size))
        family = family.override(chunk=self.chunk, first_chunk=self.first_chunk)
        dtype = self.dtype or "bfloat16"
        if self.config is not None:
            return CONFIGS[self.config], family, dtype
        require(self.weights is not None, f"--model {self.model} needs --weights PATH, or --config 1.3B | 14B")
        assert self.weights is not None
        checkpoint = Checkpoint(weights=self.weights, family=family, dtype=dtype)
        return check(checkpoint, pixels=False, backend="triton", device=device).config, family, dtype


def told(one: "Compiled") -> str:
    """What became of one version of a kernel."""
    how = "was in Triton's cache" if one.cached else f"compiled in {one.seconds:.1f} s"
    return f"{one.kernel}: {how}"


def summary(compiled: "list[Compiled]") -> str:
    """A line for each kernel, and one for all: versions, seconds, and how many were there already."""
    lines = []
    for name in [*dict.fromkeys(one.kernel for one in compiled), "in all"]:
        found = [one for one in compiled if name in (one.kernel, "in all")]
        new = [one for one in found if not one.cached]
        seconds = sum(one.seconds for one in new)
        lines.append(f"{name:28}{len(new):3} compiled in {seconds:6.1f} s, {len(found) - len(new):3} were there")
    return "\n".join(lines)
