"""Temporal positions: which angle each visible key frame and each query frame is turned by, per band and per head.

    theta'_j = theta_j * (1 + (1 - g_j) * (1/s - 1)),   theta_j = base^(-2j / 2T),   j = 0 .. T-1

theta_j is the model's temporal frequency (radians per latent frame), s >= 1 how far the horizon is extended, g_j the
share of band j that is extrapolated (1: as trained, 0: interpolated by s). In this form s = 1 gives theta bit for bit.
Letters: see the glossary (flexkern/docs/architecture.md).
Source: a reconstruction of FLEX (arXiv 2602.14027); PI (2306.15595), NTK-aware and YaRN (2309.00071), RIFLEx
(2502.15894), LoL (2601.16914), the slot positions of LongLive and Infinity-RoPE (2511.20649), the sink of Deep Forcing
(2512.05081) that moves along.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ..checks import check_fields, is_index, require

HORIZON = 21  # latent frames that Self-Forcing and Wan were trained on: 81 pictures
CUT = 45  # where Infinity-RoPE puts the first frame after a cut, beside a window of 6
TURN = 2**64  # the unit of fixed-point angles
PER_RADIAN = int(TURN**2 / Fraction("6.28318530717958647692528676655900576839433879875021"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Phases:
    """Angles in radians, reduced mod 2 pi to [-pi, pi], counted from the first query frame."""

    query: np.ndarray
    """float64 [F, G, T]"""
    key: np.ndarray
    """float64 [K, R, G, T]; K = 1 where one modulation serves the whole chunk, F where each query frame has its own"""
    logit_scale: np.ndarray
    """float64 [F]: multiplies the attention logits of a query frame"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionPolicy:
    """Where in time every frame sits, and how fast each temporal band turns.

    r_j are the cycles that band j completes in ``train_len`` frames; s is the horizon extension. How to modulate,
    defaults included, is an open choice of this reconstruction.
    """

    mode: Literal["none", "pi", "ntk", "yarn", "by_parts", "hard", "riflex", "jitter"] = "by_parts"
    """how bands are slowed. none: as trained; pi: all by s (g = 0); ntk: base * s^(D/(D-2)), D = 2T; by_parts: g rises
    from 0 at r_j = alpha to 1 at r_j = beta; yarn: by_parts with the thresholds and the temperature of language models;
    hard: g = 1 where r_j >= beta, else 0; riflex: one band gets 0.9 * 2 pi / (s * train_len) when s > 1; jitter: head h
    has base * (1 + jitter_sigma * e_h), e_h uniform in [-1, 1], at every s (LoL)"""
    train_len: int | None = None
    """latent frames that the model was trained on (Self-Forcing 21, LongLive 240), never inferred from the cache. None:
    what is known of the model, else 21"""
    alpha: float | None = None
    """cycles in training below which a band is slowed by s; None: 0.25, in mode yarn 1"""
    beta: float | None = None
    """cycles in training from which a band stays as trained; None: 1, in mode yarn 32"""
    ramp: Literal["linear", "smooth", "cosine"] = "linear"
    """how g rises between alpha and beta: linear, smooth (3g^2 - 2g^3) or cosine ((1 - cos(pi g)) / 2)"""
    scale: float | Literal["auto"] = "auto"
    """the horizon extension s itself, or auto: computed as scale_schedule says"""
    scale_schedule: Literal["static", "dynamic", "per_chunk"] = "per_chunk"
    """what s follows where scale is auto. static: max(1, target / train_len); dynamic: max(1, (t + 1) / train_len) for
    each query frame t; per_chunk: that of the chunk's last frame for all of it, which needs no target and leaves a
    video as trained until it outgrows train_len"""
    start: Literal["always", "past"] = "always"
    """past: s = 1 until the chunk's last frame index reaches train_len"""
    reach: Literal["all", "beyond"] = "all"
    """which distances are slowed: all; or beyond, only those to keys that lie train_len frames or more before the
    chunk's last, as the sink does in the end: distances inside a trained window stay as trained. Of a chunk that is
    longer than train_len, such as a whole clip, all are"""
    logit_temp: float | None = None
    """attention logits are multiplied by (1 + logit_temp * ln s)^2, as YaRN scales query and key both; None: 0, in mode
    yarn 0.1"""
    table: tuple[float, ...] | None = None
    """one multiplier theta'_j / theta_j per band; overrides mode, scale and start (logit_temp still follows s)"""
    index: Literal["absolute", "slot"] = "absolute"
    """what a position is: absolute, the frame's index in the video; slot, its index in the list of attended frames,
    with the frames being computed at its end ("slot index" in the papers; not the slot of its page)"""
    sink_gap: int | None = None
    """how many frames lie, at least, between the sink, which is the head of the window up to the first frame that is
    missing, and what is seen behind it: the sink moves along with the video (Deep Forcing; index absolute only), but
    never to before its own frames. None: it stays at its own frames, however far behind they are"""
    base: float = 10000.0
    """base of the model's temporal frequencies"""
    riflex_band: int | None = None
    """the band that mode riflex slows, from 0; None: the one whose period is nearest train_len"""
    jitter_sigma: float = 0.8
    """how far mode jitter spreads the bases of the heads"""
    jitter_seed: int = 0
    """seed of mode jitter's draws; head h always gets the h-th"""
    cut_position: int | None = None
    """where the first frame after a scene cut sits (Infinity-RoPE; index slot only). None: 45, or twice the window
    where that is more, so that a cut is farther away than anything in the window"""

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.thresholds
        require(self.horizon >= 1, f"train_len must be at least 1 latent frame, got {self.train_len}")
        require(low >= 0 and high > 0, f"alpha must be >= 0 and beta > 0, got {low} and {high}")
        ramped = self.mode in ("by_parts", "yarn")
        require(low < high or not ramped, f"alpha must be below beta, got alpha = {low} and beta = {high}")
        require(self.scale == "auto" or self.scale >= 1, f"scale must be 'auto' or >= 1, got {self.scale}")
        require(self.temperature >= 0, f"logit_temp must be >= 0, got {self.temperature}")
        require(min(self.table or (0,)) >= 0, f"table must hold multipliers >= 0, got {self.table}")
        require(self.base > 1, f"base must be > 1, got {self.base}")
        require(0 <= self.jitter_sigma < 1, f"jitter_sigma must be in [0, 1), got {self.jitter_sigma}")
        for name in ("riflex_band", "jitter_seed", "cut_position", "sink_gap"):
            require((getattr(self, name) or 0) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")

    @property
    def horizon(self) -> int:
        """train_len in use: the given one, or that of Self-Forcing."""
        return HORIZON if self.train_len is None else self.train_len

    @property
    def thresholds(self) -> tuple[float, float]:
        """alpha and beta in use: the given ones, or the mode's own."""
        low, high = (1.0, 32.0) if self.mode == "yarn" else (0.25, 1.0)
        return low if self.alpha is None else self.alpha, high if self.beta is None else self.beta

    @property
    def temperature(self) -> float:
        """logit_temp in use: the given one, or the mode's own."""
        default = 0.1 if self.mode == "yarn" else 0.0
        return default if self.logit_temp is None else self.logit_temp

    def resolve(self, window: int) -> "PositionPolicy":
        """The same with every None that stands for a value replaced by it, beside a window of so many frames.

        What the mode does not use stays None, and so does riflex_band, which only the model's bands decide.
        """
        found: dict[str, Any] = {"train_len": self.horizon, "logit_temp": self.temperature}
        if self.table is None and self.mode in ("by_parts", "yarn"):
            found |= dict(zip(("alpha", "beta"), self.thresholds, strict=True))
        if self.table is None and self.mode == "hard":
            found["beta"] = self.thresholds[1]
        if self.index == "slot" and self.cut_position is None:
            found["cut_position"] = max(CUT, 2 * window)
        return replace(self, **found)

    def frequencies(self, bands: int) -> np.ndarray:
        """The model's own theta_j = base^(-2j / 2T), float64 [T], radians per latent frame."""
        require(is_index(bands, 1), f"bands must be an int >= 1, got {bands!r}")
        return 1.0 / self.base ** (np.arange(0, 2 * bands, 2) / (2 * bands))

    def cycles(self, bands: int) -> np.ndarray:
        """Cycles r_j = train_len * theta_j / 2 pi that each band completes inside the training horizon, float64 [T]."""
        return self.horizon * self.frequencies(bands) / (2 * np.pi)

    def kept(self, bands: int) -> np.ndarray:
        """The share g_j of each band that is extrapolated, float64 [T], of modes pi, hard, by_parts and yarn."""
        cycles, (low, high) = self.cycles(bands), self.thresholds
        if self.mode in ("pi", "hard"):
            return (cycles >= (np.inf if self.mode == "pi" else high)).astype(np.float64)
        g = np.clip((cycles - low) / (high - low), 0.0, 1.0)
        ramps = {"linear": g, "smooth": g * g * (3.0 - 2.0 * g), "cosine": (1.0 - np.cos(np.pi * g)) / 2.0}
        return ramps[self.ramp]

    def multipliers(self, scale: float, bands: int, heads: int = 1) -> np.ndarray:
        """theta'_j / theta_j at horizon extension ``scale``, float64 [G, T]; G = heads in mode jitter, else 1.

        Raises:
            ValueError: table or riflex_band does not fit the number of bands, or scale is below 1.
        """
        theta = self.frequencies(bands)
        require(is_index(heads, 1), f"heads must be an int >= 1, got {heads!r}")
        require(np.isfinite(scale) and scale >= 1, f"scale must be finite and >= 1, got {scale}")
        if self.table is not None:
            require(len(self.table) == bands, f"table must hold {bands} multipliers, got {len(self.table)}")
            return np.array([self.table], dtype=np.float64)
        if self.mode == "none":
            return np.ones((1, bands))
        if self.mode == "jitter":
            draws = np.random.Generator(np.random.Philox(self.jitter_seed)).uniform(-1.0, 1.0, (heads, 1))
            return (1.0 + self.jitter_sigma * draws) ** -(np.arange(bands) / bands)
        if self.mode == "ntk":  # (s^(D / (D-2)))^(-2j / D)
            return float(scale) ** -np.linspace(0.0, 1.0, bands)[None]
        if self.mode == "riflex":
            nearest = int(np.argmin(np.abs(2 * np.pi / theta - self.horizon)))
            band = nearest if self.riflex_band is None else self.riflex_band
            require(band < bands, f"riflex_band must be below the {bands} bands of this model, got {band}")
            slowed = 0.9 * 2 * np.pi / (scale * self.horizon) / theta[band]
            return np.where((np.arange(bands) == band) & (scale > 1), slowed, 1.0)[None]
        return (1.0 + (1.0 - self.kept(bands)) * (1.0 / scale - 1.0))[None]

    def scales(self, query: Sequence[int], target: int | None = None) -> np.ndarray:
        """Horizon extension s of each query frame, float64 [F]; 1 where nothing depends on it.

        Args:
            query: As in ``phases``.
            target: As in ``phases``.

        Raises:
            ValueError: scale_schedule is static and there is no target.
        """
        frames = np.array(query, dtype=np.float64)
        if self.scale == "auto" and self.scale_schedule == "static" and (self._modulated or self.temperature):
            fix = "pass target, set scale to a number, or scale_schedule to 'per_chunk' or 'dynamic'"
            require(target is not None, f"scale_schedule 'static' needs the length of the video: {fix}")
            require(is_index(target, 1), f"target must be an int >= 1 latent frames, got {target!r}")
        waits = self.start == "past" and frames[-1] < self.horizon
        if waits or not (self._modulated or self.temperature):
            return np.ones(len(frames))
        if self.scale != "auto":
            return np.full(len(frames), float(self.scale))
        lengths = {"static": target or 1, "dynamic": frames + 1, "per_chunk": frames[-1] + 1}[self.scale_schedule]
        return np.maximum(np.ones(len(frames)), lengths / self.horizon)

    def phases(
        self, *, query: Sequence[int], visible: Sequence[int], bands: int, heads: int,
        target: int | None = None, cut: bool = False,
    ) -> Phases:  # fmt: skip
        """Angles of one chunk, exact to float64 rounding at any frame index.

        Args:
            query: Absolute indices of the F frames being computed.
            visible: Absolute indices of the R frames attended, in list order, those being computed last.
            bands: Temporal bands T of the model.
            heads: Heads H of the model.
            target: Latent frames of the whole video, if known.
            cut: Whether the queries and the last F keys sit at ``cut_position`` + i (Infinity-RoPE's scene cut).

        Raises:
            ValueError: Indices are bad, positions are absolute at a cut, or as ``scales`` and ``multipliers`` raise.
        """
        query_at, key_at = self._positions(query, visible, cut)
        scales = self.scales(query, target)
        per_frame = self._modulated and self.scale == "auto" and self.scale_schedule == "dynamic"
        modulations = scales if per_frame else scales[-1:]
        theta = self.frequencies(bands) * np.stack([self.multipliers(s, bands, heads) for s in modulations])
        near, turned = theta, _reduce(key_at[None, :, None, None], theta[:, None])
        if self.reach == "beyond" and self._modulated and query_at[-1] - query_at[0] < self.horizon:
            near = self.frequencies(bands) * self.multipliers(1.0, bands, heads)[None]
            inside = query_at[-1] - key_at < self.horizon
            turned[:, inside] = _reduce(key_at[inside, None, None], near)
        return Phases(
            query=_reduce(query_at[:, None, None], near),
            key=turned,
            logit_scale=(1.0 + self.temperature * np.log(scales)) ** 2,
        )

    @property
    def _modulated(self) -> bool:
        return self.table is None and self.mode not in ("none", "jitter")

    def _positions(self, query: Sequence[int], visible: Sequence[int], cut: bool) -> tuple[np.ndarray, np.ndarray]:
        """Positions of queries int64 [F] and keys int64 [R], less that of the first query."""
        for name, at in (("query", query), ("visible", visible)):
            listed = len(at) > 0 and all(map(is_index, at))
            require(listed, f"{name} must list frame indices >= 0, at least one, got {list(at)}")
        require(not cut or self.index == "slot", "a cut needs index 'slot': absolute positions have no gap to jump")
        query_at, key_at = list(query), list(visible)
        if self.index == "absolute" and self.sink_gap is not None:
            key_at = self._followed(key_at, self.sink_gap)
        if self.index == "slot":
            first = len(visible) - len(query)
            require(first >= 0, f"visible must include the query frames, got {len(visible)} for {len(query)} queries")
            key_at = list(range(len(visible)))
            if cut:
                jump = CUT if self.cut_position is None else self.cut_position
                key_at[first:] = range(jump, jump + len(query))
            query_at = key_at[first:]
        origin = int(query_at[0])
        from_origin = lambda at: np.array([int(p) - origin for p in at], dtype=np.int64)
        return from_origin(query_at), from_origin(key_at)

    @staticmethod
    def _followed(frames: list[int], gap: int) -> list[int]:
        """Frames, of which the head has moved to so many before the rest."""
        steps = [b - a for a, b in pairwise(frames)]
        if steps.count(1) == len(steps):
            return frames
        head = next(i for i, step in enumerate(steps, 1) if step != 1)
        rest = next(i for i in range(len(steps), 0, -1) if steps[i - 1] != 1)  # where the frames of late begin
        moved = max(0, frames[rest] - gap - rest - frames[0])
        return [frame + moved * (i < head) for i, frame in enumerate(frames)]


def _reduce(offset: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """offset * theta mod 2 pi in [-pi, pi], with the float64 theta taken as exact. int64 and float64, broadcast.

    A full turn is 2^64, so that the product of integers wraps by itself; ``rest`` carries what theta has beyond that.
    """
    steps = [divmod(n * PER_RADIAN // d, TURN) for n, d in map(float.as_integer_ratio, theta.ravel().tolist())]
    whole = np.array([step % TURN for step, _ in steps], dtype=np.uint64).reshape(theta.shape)
    rest = np.array([part / TURN for _, part in steps]).reshape(theta.shape)
    return ((offset.astype(np.uint64) * whole).view(np.int64) + offset * rest) * (2 * np.pi / TURN)
