"""Presets: every supported method's positions, retention, noise and prompt switches, under one name."""

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Mapping
from operator import attrgetter
from typing import Literal

from ..checks import check_fields, did_you_mean, require
from .effect import idle
from .noise import NoisePolicy
from .position import PositionPolicy
from .retention import RetentionPolicy, SinkWindow
from .switch import SwitchPolicy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopPolicy:
    """In which order frames and denoising steps are run."""

    kind: Literal["chunk"] = "chunk"
    """chunk: all steps of a chunk, then its clean pass, then the next chunk (``Session.step``)"""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A method: its policies under a name, with one sentence on it and its source."""

    name: str
    position: PositionPolicy
    """where in time every frame sits"""
    retention: RetentionPolicy
    """which cached frames stay visible"""
    noise: NoisePolicy
    """what a frame is denoised from"""
    switch: SwitchPolicy
    """what a change of prompt does to the cache"""
    loop: LoopPolicy = LoopPolicy()
    """the order of frames and steps; no option of the command line while it has one value"""
    doc: str
    source: str

    def __post_init__(self) -> None:
        check_fields(self)
        recent, window, kind = self.switch.recent, self.retention.capacity, self.switch.kind
        held = recent is None or recent <= window or kind == "keep"
        require(held, f"switch.recent must be at most the {window} frames of the window, got {recent} for {kind!r}")
        evicted, position = self._evicted, self.position
        kept = kind == "keep" or evicted in (None, "drop", "sink")
        require(kept, f"switch.kind must be 'keep' where retention.evicted is {evicted!r}, got {kind!r}")
        plain = position.mode == "none" and position.table is None and position.index == "absolute"
        needed = "position.mode must be 'none', index 'absolute' and table None where retention.evicted is 'choose'"
        got = f"got {position.mode!r}, {position.index!r} and {position.table}"
        require(plain or evicted != "choose", f"{needed}, {got}")
        told = f"position.sink_gap must be None where retention.evicted is 'sweep', got {position.sink_gap}"
        require(evicted != "sweep" or position.index == "slot" or position.sink_gap is None, told)

    @property
    def _evicted(self) -> str | None:
        return self.retention.evicted if isinstance(self.retention, SinkWindow) else None

    @property
    def chooses_tokens(self) -> bool:
        """Whether tokens are chosen while a pass runs, by the queries of all heads."""
        return self._evicted == "choose"

    def override(self, overrides: Mapping[str, object]) -> "Preset":
        """The same with single fields of its policies replaced.

        Args:
            overrides: Dotted names to values, ``{"position.alpha": 0.3, "retention.sink": 6}``; a list stands for a
                tuple.

        Raises:
            ValueError: A field is unknown (the message names those that exist), or does not take its value.
        """
        existing = [f"{policy}.{f.name}" for policy in POLICIES for f in dataclasses.fields(getattr(self, policy))]
        changes: dict[str, dict[str, object]] = defaultdict(dict)
        for dotted, value in overrides.items():
            known = f"expected one of {', '.join(existing)}"
            require(dotted in existing, f"no field {dotted!r}: {known}{did_you_mean(dotted, existing)}")
            policy, _, field = dotted.partition(".")
            changes[policy][field] = tuple(value) if isinstance(value, list) else value
        replaced = {policy: (getattr(self, policy), new) for policy, new in changes.items()}
        try:
            return dataclasses.replace(
                self, **{p: dataclasses.replace(old, **new) for p, (old, new) in replaced.items()}
            )
        except TypeError as error:
            raise ValueError(str(error)) from None

    def for_horizon(self, frames: int) -> "Preset":
        """The same for a model that was trained on so many latent frames, where ``position.train_len`` is None."""
        if self.position.train_len is not None:
            return self
        return dataclasses.replace(self, position=dataclasses.replace(self.position, train_len=frames))

    def resolve(self) -> "Preset":
        """The same with every field that follows another one, or its mode, set to the value in use.

        ``None`` in such a field means "follow": a preset stays as it was written, so that later overrides are followed
        too, and whatever runs it asks for the values here. What nothing uses stays None.
        """
        window = self.retention.capacity
        return dataclasses.replace(
            self, position=self.position.resolve(window), noise=self.noise.resolve(self.position.horizon),
            switch=self.switch.resolve(window),
        )  # fmt: skip

    def validate(self, *, chunk: int, bands: int, heads: int, target: int | None, least: int | None = None) -> None:
        """Raise unless the preset can run with a model and a length of video.

        Args:
            chunk: The most frames computed together.
            bands: Temporal frequency pairs of a head.
            heads: Heads of the model.
            target: Latent frames of the video, None for no end.
            least: The fewest frames that the preset's noise is drawn for together; None where it is not used.

        Raises:
            ValueError: The window is too small for the chunk, positions fit neither the model nor the length, or
                there is no such noise for so few frames.
        """
        if least is not None:
            self.noise.validate(chunk=least)
        for frames in ((), range(self.retention.capacity)):
            self.retention.keep(frames, chunk)
        self.position.phases(query=[0], visible=[0], bands=bands, heads=heads, target=target)

    def describe(self) -> dict[str, object]:
        """Every field that decides a video, by the dotted names of ``get_preset``; lists for tuples, as JSON has.

        Fields that follow others have the value in use (``resolve``).
        """
        found: dict[str, object] = {"name": self.name}
        for policy in (*POLICIES, "loop"):
            for name, value in dataclasses.asdict(getattr(self.resolve(), policy)).items():
                found[f"{policy}.{name}"] = list(value) if isinstance(value, tuple) else value
        return found


POLICIES = ("position", "retention", "noise", "switch")  # whose fields can be overridden

IID = NoisePolicy(kind="iid")
KEEP = SwitchPolicy(kind="keep")
RECACHE = SwitchPolicy(kind="recache", keep_sink=True)
FIFO = SinkWindow(sink=0, window=21)
PINNED = SinkWindow(sink=3, window=21)
LONGLIVE = SinkWindow(sink=3, window=12)

_ALL = (
    Preset(
        name="self-forcing",
        position=PositionPolicy(mode="none"),
        retention=FIFO,
        noise=IID,
        switch=KEEP,
        doc="The base model extrapolated: absolute positions, the last 21 frames.",
        source="Self-Forcing, arXiv 2506.08009, official code",
    ),
    Preset(
        name="longlive",
        position=PositionPolicy(mode="none", train_len=240),
        retention=LONGLIVE,
        noise=IID,
        switch=RECACHE,
        doc="A pinned first chunk and the last 9 frames at absolute positions; a new prompt recomputes the cache.",
        source="LongLive, arXiv 2509.22622, official code v1.0",
    ),
    Preset(
        name="longlive-infinite",
        position=PositionPolicy(mode="none", train_len=240, index="slot"),
        retention=LONGLIVE,
        noise=IID,
        switch=RECACHE,
        doc="LongLive with positions 0..11 inside the window, so that no distance ever leaves the trained range.",
        source="LongLive, official code v1.0, use_infinite_attention",
    ),
    Preset(
        name="infinity-rope",
        position=PositionPolicy(mode="none", index="slot"),
        retention=SinkWindow(sink=1, window=6),
        noise=IID,
        switch=SwitchPolicy(kind="flush"),
        doc="Positions 0..5 inside a short window; a new prompt flushes the cache, a scene cut jumps to position 45.",
        source="Infinity-RoPE, arXiv 2511.20649, official code",
    ),
    Preset(
        name="reward-forcing",
        position=PositionPolicy(mode="none", index="slot"),
        retention=SinkWindow(sink=3, window=9, evicted="sink"),
        noise=IID,
        switch=KEEP,
        doc="Positions 0..8 inside the window; frames that leave it are merged into the first three.",
        source="Reward-Forcing, arXiv 2512.04678, official code",
    ),
    Preset(
        name="memrope",
        position=PositionPolicy(mode="none", index="slot"),
        retention=SinkWindow(sink=3, window=12, evicted="memory"),
        noise=IID,
        switch=KEEP,
        doc="Positions 0..11 inside the window; frames that leave it are merged into two memory frames, slow and fast.",
        source="MemRoPE, arXiv 2603.12513, official code",
    ),
    Preset(
        name="rolling-sink",
        position=PositionPolicy(mode="none", index="slot"),
        retention=SinkWindow(sink=18, window=21, evicted="sweep"),
        noise=IID,
        switch=KEEP,
        doc="Positions 0..20 inside the window, where the first 18 frames stand again and again, forwards and back.",
        source="Rolling Sink, arXiv 2602.07775, official code",
    ),
    Preset(
        name="deep-forcing",
        position=PositionPolicy(mode="none", sink_gap=3),
        retention=SinkWindow(sink=10, window=21, evicted="choose"),
        noise=IID,
        switch=KEEP,
        doc="The first frames, which move along, and the tokens that later queries want most of those that leave.",
        source="Deep Forcing, arXiv 2512.05081, code release; 3 frames apart as there, 0 in the paper",
    ),
    Preset(
        name="deep-sink",
        position=PositionPolicy(mode="none", sink_gap=3),
        retention=SinkWindow(sink=14, window=21),
        noise=IID,
        switch=KEEP,
        doc="Two thirds of the window are the first frames, whose positions move along behind the others.",
        source="Deep Forcing, arXiv 2512.05081, Deep Sink alone; 3 frames apart as in the code release, 0 in the paper",
    ),
    Preset(
        name="lol",
        position=PositionPolicy(mode="jitter", train_len=240, jitter_sigma=0.8),
        retention=LONGLIVE,
        noise=IID,
        switch=KEEP,
        doc="Every head gets a base of its own, so that heads do not return to the sink all at once.",
        source="LoL, arXiv 2601.16914",
    ),
    Preset(
        name="riflex",
        position=PositionPolicy(mode="riflex"),
        retention=FIFO,
        noise=IID,
        switch=KEEP,
        doc="Slows the one band whose period is nearest the training length until it does not repeat.",
        source="RIFLEx, arXiv 2502.15894; its s is static, ours follows the chunk unless scale_schedule says otherwise",
    ),
    Preset(
        name="pi",
        position=PositionPolicy(mode="pi"),
        retention=PINNED,
        noise=IID,
        switch=KEEP,
        doc="Position interpolation: every band slowed by s.",
        source="Position Interpolation, arXiv 2306.15595, applied to the temporal axis",
    ),
    Preset(
        name="ntk",
        position=PositionPolicy(mode="ntk"),
        retention=PINNED,
        noise=IID,
        switch=KEEP,
        doc="NTK-aware scaling: a larger base, which slows band j by s^(j / (T - 1)).",
        source="NTK-aware RoPE, described in arXiv 2309.00071, applied to the temporal axis",
    ),
    Preset(
        name="yarn",
        position=PositionPolicy(mode="yarn"),
        retention=PINNED,
        noise=IID,
        switch=KEEP,
        doc="YaRN with the thresholds of language models, which interpolates nearly every band of a video model.",
        source="YaRN, arXiv 2309.00071, applied to the temporal axis",
    ),
    Preset(
        name="flex",
        position=PositionPolicy(mode="by_parts", scale="auto", reach="beyond"),
        retention=PINNED,
        noise=NoisePolicy(kind="ar1", rho=-0.7),
        switch=KEEP,
        doc="Interpolates under-trained bands beyond the trained range, draws antiphase noise, pins the first chunk.",
        source="a reconstruction of FLEX, arXiv 2602.14027: its authors have published no code",
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def get_preset(name: str | Preset, overrides: Mapping[str, object] | None = None) -> Preset:
    """The preset of that name, or the given one, with single fields of its policies replaced.

    Overrides that change no video, because the values of other fields leave them without use, are told as a warning.

    Args:
        name: A key of ``PRESETS``, or a preset.
        overrides: As ``Preset.override`` takes them.

    Returns:
        A new preset where there are overrides.

    Raises:
        ValueError: The preset is unknown (the message names those that exist), or as ``Preset.override``.
    """
    if not isinstance(name, Preset):
        known = f"expected one of {', '.join(PRESETS)}"
        require(isinstance(name, str) and name in PRESETS, f"no preset {name!r}: {known}{did_you_mean(name, PRESETS)}")
    base = name if isinstance(name, Preset) else PRESETS[name]
    if not overrides:
        return base
    preset = base.override(overrides)
    said = [dotted for dotted in idle_fields(preset) if dotted in overrides]
    if lost := [dotted for dotted in said if attrgetter(dotted)(preset) != attrgetter(dotted)(base)]:
        warnings.warn(f"without effect in {preset.name}: {', '.join(lost)}", stacklevel=2)
    return preset


def position_of(policy: object) -> PositionPolicy:
    """The positions of a policy, of a preset or of the preset of that name.

    Raises:
        TypeError: It is none of these.
        ValueError: There is no such preset.
    """
    if isinstance(policy, PositionPolicy):
        return policy
    if not isinstance(policy, (str, Preset)):
        raise TypeError(f"policy must be a PositionPolicy, a Preset or its name, got {type(policy).__name__}")
    return get_preset(policy).position


def idle_fields(preset: Preset) -> tuple[str, ...]:
    """The dotted names of the fields that could have any other value and the videos would be the same.

    Args:
        preset: The method, with its overrides.

    Returns:
        Names as ``get_preset`` takes them, in the order of the policies and their fields.
    """
    sink = preset.retention.pinned > 0
    return tuple(f"{policy}.{name}" for policy in POLICIES for name in idle(getattr(preset, policy), sink=sink))
