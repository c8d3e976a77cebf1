"""Videos of one engine: what makes them, and what their sidecars say of that."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.render.choices import DEMO
from flexkern.render.encoding import STDOUT, is_sequence
from flexkern.render.order import Order
from flexkern.render.sidecar import fingerprint, is_done
from flexkern.render.spec import JobSpec
from flexkern.render.target import JOB, parts_name, taken, validate_new, validate_targets

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.checkpoint import Checkpoint, Parts
    from flexkern.model.families import Family
    from flexkern.model.wan import WanConfig
    from flexkern.parallel import Ranks

AT_ONCE = 50_000_000  # bytes that load before one could read a line about it


@dataclass(slots=True, kw_only=True)
class Batch:
    """Videos of one engine."""

    base: JobSpec
    """what they are made with, as it was said; what they show is in the orders"""
    family: "Family"
    device: str
    threads: int
    orders: list[Order]
    checkpoint: "Checkpoint | None"
    """None of the demo"""
    weights: Path | None
    """of the demo"""
    graphs: bool = True
    parts: "Parts | None" = None
    """of the checkpoint, once ``check`` has found them"""
    ranks: "Ranks | None" = None
    """what computes each video together"""
    prints: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """fingerprints of files, once they are asked for"""
    _config: "WanConfig | None" = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys(prompt for order in self.orders for prompt in order.prompts))

    @property
    def config(self) -> "WanConfig":
        """Sizes of the transformer, once ``check`` has found them."""
        assert self._config is not None, "check comes first"
        return self._config

    def check(self) -> None:
        """Find the parts of the checkpoint, and check them for the orders before weights are read.

        Raises:
            MissingPart: A VAE or a text encoder is needed and there is none; a ValueError.
            ValueError: Anything else that does not fit.
            FileNotFoundError: A file is not there.
        """
        from flexkern import pipeline
        from flexkern.demo import encode_prompts

        if self.checkpoint is None:
            self._config = read_demo(self.weights)
            for prompt in self.prompts:
                encode_prompts([prompt])
            self.check_preset(self.orders[0])
            return
        first = self.orders[0]
        self.parts = pipeline.check(
            self.checkpoint,
            prompts=self.prompts,
            preset=first.method,
            frames=self.family.frames(first.pictures),
            image=self.base.image,
            pixels=self.base.latents is None,
            backend=self.base.backend,
            device=self.device,
        )
        self._config = self.parts.config
        found = {"the transformer": self.parts.transformer, "the VAE": self.parts.vae}
        found |= {"the text encoder": self.parts.text_encoder}
        targets = [order.target for order in self.orders]
        validate_targets(targets, {name: path for name, path in found.items() if path})

    def check_preset(self, order: Order) -> None:
        """Raises ValueError where the preset of an order does not fit the model that was checked, or the length."""
        from flexkern.pipeline import validate_preset

        frames, begins = self.family.frames(order.pictures), self.base.image is not None
        validate_preset(self.family, self.config, order.method, frames, begins=begins)

    def open(self, *, tell: Callable[[str], None] = lambda _: None, keep_encoder: bool = False) -> "Engine":
        """The engine, with weights loaded and prompts encoded.

        Args:
            tell: Hears what is loaded, where that takes long.
            keep_encoder: Whether the text encoder stays, for prompts that are not known yet.

        Raises:
            ValueError: A prompt that it cannot follow.
        """
        import torch

        from flexkern.engine import Engine

        sizes = {path: size(path) for path in self.files().values()}
        if sum(sizes.values()) > AT_ONCE:
            tell(f"loading {', '.join(f'{path} ({in_words(count)})' for path, count in sizes.items())}")
        if self.threads != torch.get_num_threads():
            torch.set_num_threads(self.threads)
        if self.parts is None:
            engine = open_demo(self.weights, self.base.backend, self.device, graphs=self.graphs, ranks=self.ranks)
        else:
            parts = replace(self.parts, prompts=()) if keep_encoder else self.parts
            engine = Engine.from_parts(parts, graphs=self.graphs, ranks=self.ranks)
        for prompt in () if keep_encoder else self.prompts:  # told before the first video
            engine.embed(prompt)
        return engine

    def files(self) -> dict[str, Path]:
        """What is read besides prompts, by what it is."""
        from flexkern import demo

        if self.parts is None:
            return {"weights": self.weights or demo.WEIGHTS}
        found = {"weights": self.parts.transformer} | ({"vae": self.parts.vae} if self.parts.vae else {})
        return found | {f"lora {i}": Path(lora.path) for i, lora in enumerate(self.parts.checkpoint.loras)}

    def about(self, order: Order) -> dict[str, Any]:
        """What the sidecar of an order says of the model; ``job`` renders it again."""
        checkpoint, inputs = self.checkpoint, self.files() | ({"image": order.image} if order.image else {})
        for path in inputs.values():
            if path not in self.prints:
                self.prints[path] = fingerprint(path)
        family = {name: one for name, one in asdict(self.family).items() if name not in ("doc", "source", "files")}
        loading = {} if checkpoint is None else {
            "dtype": checkpoint.dtype, "ema": checkpoint.ema, "lora_scale": [lora.scale for lora in checkpoint.loras],
        }  # fmt: skip
        return {
            "job": self.spec(order).to_dict(),
            "model": {**family, **loading, "backend": self.base.backend},
            "files": {name: self.prints[path] for name, path in inputs.items()},
        }

    def spec(self, order: Order) -> JobSpec:
        """The job of an order, with everything said: its paths start at the root, and so it holds in any folder."""
        base = self.base
        whole: Callable[[Path | None], Path | None] = lambda path: None if path is None else path.absolute()
        target = whole(order.target)
        return replace(
            base,
            model=DEMO if self.checkpoint is None else base.model,
            weights=whole(self.weights if self.checkpoint is None else base.weights),
            vae=whole(base.vae),
            text_encoder=whole(base.text_encoder),
            tokenizer=whole(base.tokenizer),
            embeddings=whole(base.embeddings),
            config_path=whole(base.config_path),
            lora=tuple(path.absolute() for path in base.lora),
            preset=order.preset,
            overrides=order.overrides,
            prompt=None,
            prompts=order.script,
            image=whole(order.image),
            seconds=None,
            num_output_frames=None,
            frames=order.pictures,
            seed=order.seed,
            out=target if order.writes == "video" else None,
            latents=None if order.writes == "video" else target,
            encoding=order.encoding,
            device=None,
        )

    def shares(self, other: "Batch") -> bool:
        """Whether one engine does for both."""
        alike = lambda one: (
            one.family, one.device, one.threads, one.checkpoint, one.weights, one.base.backend, one.graphs,
            one.base.image, one.base.latents is None,
        )  # fmt: skip
        return bool(alike(self) == alike(other))

    def skips(self, order: Order) -> bool:
        """Whether an order is done already. Raises FileExistsError where its target is something else."""
        if order.target == STDOUT:
            return False
        if is_done(order, self.about(order)):
            return True
        if not begun(order.target) or (taken(order.target) and not is_sequence(order.target)):
            validate_new(order.target)
        return False


def begun(target: Path) -> bool:
    """Whether a render to a file was stopped, and can go on."""
    return (parts_name(target) / JOB).is_file()


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def in_words(count: int) -> str:
    """A number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def read_demo(weights: Path | None) -> "WanConfig":
    """Sizes of the demo's model. Raises ValueError for weights of another form, FileNotFoundError where none are."""
    from flexkern import demo
    from flexkern.model.families import FAMILIES

    try:
        return demo.read_config(weights or demo.WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{error}; for a checkpoint give --model {' | '.join(FAMILIES)}") from None


def open_demo(
    weights: Path | None, backend: str, device: str, *, graphs: bool = True, ranks: "Ranks | None" = None
) -> "Engine":
    """The engine of the demo, or of weights of its form."""
    from flexkern import demo

    return demo.load_engine(weights or demo.WEIGHTS, backend=backend, device=device, graphs=graphs, ranks=ranks)
