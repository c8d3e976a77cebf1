"""What commands ask for: a plan of each as far as that goes without torch, then videos that share an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexkern.cli.errors import in_flags, note, translated
from flexkern.cli.flags import Flags
from flexkern.cli.jobs import Setting
from flexkern.cli.ranks import count_ranks, validate_count
from flexkern.cli.videos import Video
from flexkern.policies import Preset
from flexkern.render.research import Research

if TYPE_CHECKING:
    from flexkern.render.batch import Batch


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
class Lot:
    """Videos of one engine, and the command of the first of them."""

    setting: Setting[Any]
    batch: "Batch"
    told: bool = False
    """whether the demo's backend was said"""

    @property
    def command(self) -> Flags:
        """The command of the first of them."""
        return self.setting.command

    def check(self) -> None:
        """Find the parts of the checkpoint, check them before weights are read, and tell what was found."""
        from flexkern.pipeline import MissingPart

        try:
            self.batch.check()
        except MissingPart as error:
            raise ValueError(translated(error.part, error.why)) from None
        parts = self.batch.parts
        batch, presets = self.batch, [order.method for order in self.batch.orders]
        validate_count(count_ranks(self.command.gpus), batch.device, batch.config, batch.family.size, presets)
        if parts is not None:
            for line in (str(parts), str(parts.backend), *map(in_flags, parts.notes), *self.not_needed()):
                note(line)

    def not_needed(self) -> list[str]:
        """What was named and is not used."""
        words, command, parts = [], self.command, self.batch.parts
        assert parts is not None
        if command.vae is not None and parts.vae is None:
            words.append(f"--vae {command.vae} is not needed: --latents are not decoded")
        if parts.text_encoder is None and parts.embeddings is not None:
            named = {"--text-encoder": command.text_encoder, "--tokenizer": command.tokenizer}
            words += [f"{name} {path} is not needed: {parts.embeddings} is" for name, path in named.items() if path]
        return words
