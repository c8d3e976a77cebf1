"""Videos of one engine: what makes them, and what their sidecars say of that."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.cli.errors import note
from flexkern.cli.flags import Flags
from flexkern.cli.jobs import Setting
from flexkern.cli.policies import DEMO
from flexkern.cli.research import Research
from flexkern.cli.videos import Video
from flexkern.policies import Preset

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.checkpoint import Checkpoint, Parts
    from flexkern.model.families import Family
    from flexkern.parallel import Ranks
    from flexkern.render import JobSpec, Order

AT_ONCE = 50_000_000  # bytes that load before one could read a line about it
BAD = ValueError, OSError, NotImplementedError  # what a user can mend


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one command asks for, read and checked as far as that goes without torch."""

    setting: Setting[Any]
    research: Research | None
    base: Preset
    """the preset before the job's and the options' changes"""
    overrides: Mapping[str, object]
    videos: Sequence[Video]


@dataclass(slots=True, kw_only=True)
class Batch:
    """Videos of one engine."""

    setting: Setting[Any]
    family: "Family"
    device: str
    threads: int
    orders: "list[Order]"
    checkpoint: "Checkpoint | None"
    """None of the demo"""
    weights: Path | None
    """of the demo"""
    parts: "Parts | None" = None
    ranks: "Ranks | None" = None
    """what computes each video together"""
    told: bool = False
    """whether the demo's backend was said"""
    prints: dict[Path, dict[str, Any]] | None = None
    """fingerprints of files, once they are asked for"""

    def open(self) -> "Engine":
        """The engine, with weights loaded and prompts encoded. Raises ValueError for a prompt it cannot follow."""
        import torch

        from flexkern.engine import Engine

        sizes = {path: size(path) for path in self.files().values()}
        if self.command.progress and sum(sizes.values()) > AT_ONCE:
            note(f"loading {', '.join(f'{path} ({in_words(count)})' for path, count in sizes.items())}")
        if self.threads != torch.get_num_threads():
            torch.set_num_threads(self.threads)
        if self.parts is None:
            engine = open_demo(
                self.weights, self.command.backend, self.device, graphs=self.command.graphs, ranks=self.ranks
            )
        else:
            engine = Engine.from_parts(self.parts, graphs=self.command.graphs, ranks=self.ranks)
            if self.parts.saves_embeddings:
                note(f"{self.parts.embeddings}: embeddings of {len(self.prompts)} prompts")
        for prompt in self.prompts:  # one that the model cannot follow is told before the first video
            engine.embed(prompt)
        return engine

    @property
    def command(self) -> Flags:
        """The command of the first of them."""
        return self.setting.command

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys(prompt for order in self.orders for prompt in order.prompts))

    def files(self) -> dict[str, Path]:
        """What is read besides prompts, by what it is."""
        from flexkern import demo

        if self.parts is None:
            return {"weights": self.weights or demo.WEIGHTS}
        found = {"weights": self.parts.transformer} | ({"vae": self.parts.vae} if self.parts.vae else {})
        return found | {f"lora {i}": Path(lora.path) for i, lora in enumerate(self.parts.checkpoint.loras)}

    def about(self, order: "Order") -> dict[str, Any]:
        """What the sidecar of an order says of the model; ``job`` renders it again."""
        from flexkern.render.sidecar import fingerprint

        checkpoint, inputs = self.checkpoint, self.files() | ({"image": order.image} if order.image else {})
        self.prints = self.prints or {}
        for path in inputs.values():
            if path not in self.prints:
                self.prints[path] = fingerprint(path)
        family = {name: one for name, one in asdict(self.family).items() if name not in ("doc", "source", "files")}
        loading = {} if checkpoint is None else {
            "dtype": checkpoint.dtype, "ema": checkpoint.ema, "lora_scale": [lora.scale for lora in checkpoint.loras],
        }  # fmt: skip
        return {
            "job": self.spec(order).to_dict(),
            "model": {**family, **loading, "backend": self.command.backend},
            "files": {name: self.prints[path] for name, path in inputs.items()},
        }

    def spec(self, order: "Order") -> "JobSpec":
        """The job of an order, with everything said: its paths start at the root, and so it holds in any folder."""
        from flexkern.render import JobSpec

        command: Any = self.command
        whole = lambda path: None if path is None else path.absolute()
        paths = ("vae", "text_encoder", "tokenizer", "embeddings", "config_path")
        target = whole(order.target)
        return JobSpec(
            model=DEMO if self.checkpoint is None else command.model,
            weights=whole(self.weights if self.checkpoint is None else command.weights),
            **{name: whole(getattr(command, name)) for name in paths},
            lora=tuple(path.absolute() for path in command.lora),
            lora_scale=command.lora_scale,
            ema=True if command.ema else False if command.no_ema else None,
            dtype=command.dtype,
            size=command.size,
            chunk=command.chunk,
            first_chunk=command.first_chunk,
            preset=order.preset,
            overrides=order.overrides,
            prompts=order.script,
            image=whole(order.image),
            frames=order.pictures,
            seed=order.seed,
            out=target if order.writes == "video" else None,
            latents=None if order.writes == "video" else target,
            encoding=order.encoding,
            backend=command.backend,
            threads=command.threads,
        )

    def shares(self, other: "Batch") -> bool:
        """Whether one engine does for both."""
        alike = lambda one: (
            one.family, one.device, one.threads, one.checkpoint, one.weights, one.command.backend, one.command.graphs,
            one.command.image, one.command.latents is None,
        )  # fmt: skip
        return bool(alike(self) == alike(other))


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def in_words(count: int) -> str:
    """A number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def validate_demo(weights: Path | None) -> None:
    """Raises ValueError where weights are not of the demo's form, FileNotFoundError where there are none."""
    from flexkern import demo
    from flexkern.model.families import FAMILIES

    try:
        demo.validate_weights(weights or demo.WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{error}; for a checkpoint give --model {' | '.join(FAMILIES)}") from None


def open_demo(
    weights: Path | None, backend: str, device: str, *, graphs: bool = True, ranks: "Ranks | None" = None
) -> "Engine":
    """The engine of the demo, or of weights of its form."""
    from flexkern import demo

    return demo.load_engine(weights or demo.WEIGHTS, backend=backend, device=device, graphs=graphs, ranks=ranks)
