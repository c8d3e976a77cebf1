"""Noise: what every latent frame is denoised from, with or without a temporal prior.

White noise is a pure function of (seed, stream, absolute frame index, denoising step), a counter-based generator on the
CPU (Philox), so any frame can be drawn at any time. The kinds mix it in float64 and round once, to float32, at the end.
eps_t is i.i.d. N(0, I), eta is drawn once and shared; every kind keeps each frame's marginal at N(0, I).
Source: a reconstruction of FLEX (arXiv 2602.14027); PYoCo (2305.10474), FreeNoise (2310.15169).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..checks import check_fields, is_index, require
from .position import HORIZON

INITIAL, RENOISE, SHARED = range(3)  # streams
RECURSIVE = ("ar1", "pyoco_progressive")
DEFAULT_WEIGHT = {"alternating": 0.7, "high_pass": 1.0, "pyoco_mixed": 1.0, "pyoco_progressive": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePolicy:
    """Which noise a frame starts from. The defaults of antiphase noise are open choices of this reconstruction."""

    kind: Literal[
        "ar1", "iid", "alternating", "zero_sum", "high_pass", "pyoco_mixed", "pyoco_progressive", "freenoise"
    ] = "ar1"
    """ar1 (antiphase noise for rho < 0): z_0 = eps_0, z_t = rho z_{t-1} + sqrt(1 - rho^2) eps_t; iid: eps_t;
    alternating: (-1)^t w eta + sqrt(1 - w^2) eps_t; zero_sum: (eps_t - mean over the chunk) * sqrt(F / (F - 1)), an
    error for a chunk of one frame; high_pass: (eps_t - a eps_{t-1}) / sqrt(1 + a^2), the first frame eps_0;
    pyoco_mixed: (a eta + eps_t) / sqrt(1 + a^2); pyoco_progressive: ar1 with rho = a / sqrt(1 + a^2), so that a < 0
    is antiphase noise; freenoise: eps_t for t < window, after that each run of ``stride`` frames shuffles the run that
    lies ``window`` frames before it"""
    rho: float = -0.7
    """correlation of neighbouring frames in kind ar1, -1 < rho < 1"""
    scope: Literal["sequence", "chunk"] = "sequence"
    """sequence: recursion, differences and eta span the video; chunk: they restart with each chunk. Kinds iid, zero_sum
    and freenoise do not use it"""
    rho_schedule: Literal["const", "linear_decay"] = "const"
    """const, or linear_decay: rho_t = rho (1 - t / (target - 1)), 0 past the target; for ar1 and pyoco_progressive"""
    apply: Literal["initial", "initial+renoise"] = "initial"
    """initial: noise between denoising steps is i.i.d.; initial+renoise: each step has a sequence of its own"""
    weight: float | None = None
    """w in [-1, 1] or a in the formulas of kind; None: 0.7 for alternating, else 1"""
    window: int | None = None
    """of freenoise: latent frames with noise of their own. None: as many as the model was trained on
    (position.train_len), in whole strides"""
    stride: int | None = None
    """of freenoise: latent frames that are shuffled together; divides window. None: the largest divisor up to 4"""

    def __post_init__(self) -> None:
        check_fields(self)
        require(abs(self.rho) < 1, f"rho must be between -1 and 1, both excluded, got {self.rho}")
        bounded = self.kind != "alternating" or abs(self.strength) <= 1
        require(bounded, f"weight of kind 'alternating' must be in [-1, 1], got {self.weight}")
        for name in ("window", "stride"):
            given = getattr(self, name)
            require(given is None or given >= 1, f"{name} must be at least 1 frame, got {given}")
        window, stride = self.runs()
        require(window % stride == 0, f"stride must divide window, got stride {stride} and window {window}")

    @property
    def strength(self) -> float:
        """weight in use: the given one, or the kind's own."""
        return DEFAULT_WEIGHT.get(self.kind, 1.0) if self.weight is None else self.weight

    def runs(self, horizon: int = HORIZON) -> tuple[int, int]:
        """window and stride in use: the given ones, or those that suit a model trained on so many latent frames."""
        if self.window is None and self.stride is not None:
            return max(1, horizon // self.stride) * self.stride, self.stride
        window = horizon if self.window is None else self.window
        return window, self.stride or max(n for n in range(1, 5) if window % n == 0)

    def resolve(self, horizon: int) -> "NoisePolicy":
        """The same with every None replaced by the value in use; what the kind does not use stays None."""
        found: dict[str, Any] = {"weight": self.strength} if self.kind in DEFAULT_WEIGHT else {}
        if self.kind == "freenoise":
            found |= dict(zip(("window", "stride"), self.runs(horizon), strict=True))
        return replace(self, **found)

    def validate(self, *, chunk: int) -> None:
        """Raise ValueError where there is no such noise for chunks of so many frames."""
        require(self.kind != "zero_sum" or chunk > 1, f"zero_sum needs chunks of at least 2 frames, got {chunk}")

    def source(self, seed: int, *, shape: tuple[int, ...], target: int | None = None) -> "NoiseSource":
        """The noise of one video.

        Args:
            seed: An int in [0, 2^64).
            shape: Of one frame, for instance (16, 60, 104).
            target: Latent frames of the video, where known.

        Raises:
            ValueError: The seed or the shape is bad, or linear_decay has no target.
        """
        require(is_index(seed) and seed < 2**64, f"seed must be an int in [0, 2^64), got {seed!r}")
        sized = isinstance(shape, tuple) and all(is_index(n, 1) for n in shape)
        require(sized, f"shape must be a tuple of ints >= 1, that of one frame, got {shape!r}")
        needed = "rho_schedule 'linear_decay' needs the length of the video: pass target, or set it to 'const'"
        decays = self.rho_schedule == "linear_decay" and self.kind in RECURSIVE
        require(not decays or target is not None, needed)
        require(target is None or is_index(target, 1), f"target must be an int >= 1 latent frames, got {target!r}")
        return NoiseSource(self, seed, shape, target)


class NoiseSource:
    """Draws the noise of one video, chunk by chunk; made by ``NoisePolicy.source``.

    ar1 and pyoco_progressive with scope sequence remember their last frame, in float64, for each denoising step: their
    frames must come in order. All else can be drawn at any frame, in any order.
    """

    def __init__(self, policy: NoisePolicy, seed: int, shape: tuple[int, ...], target: int | None) -> None:
        self.policy, self.seed, self.shape, self.target = policy, seed, shape, target
        self._last: dict[str, tuple[int, np.ndarray]] = {}  # sequence -> its last frame's index and z

    def initial(self, frames: Sequence[int]) -> np.ndarray:
        """What denoising starts from, float32 [F, *shape].

        Args:
            frames: Absolute indices of a chunk, consecutive.

        Raises:
            ValueError: The frames are not consecutive, or do not follow the last ones where the kind is recursive.
        """
        return self._draw(frames, INITIAL, 0, self.policy.kind)

    def renoise(self, frames: Sequence[int], step: int) -> np.ndarray:
        """Fresh noise after denoising step ``step`` (0, 1, ..), float32 [F, *shape]. frames, errors: as ``initial``."""
        require(is_index(step), f"step must be an int >= 0, got {step!r}")
        everywhere = self.policy.apply == "initial+renoise"
        return self._draw(frames, RENOISE, step, self.policy.kind if everywhere else "iid")

    def restart(self) -> None:
        """Let the next frames begin their sequences, whichever they are: those before them were not drawn here."""
        self._last = {}

    def state(self) -> dict[str, np.ndarray | int]:
        """All that a resumed render needs: the seed and, for each recursive sequence, its last index and float64 z."""
        state: dict[str, np.ndarray | int] = {"seed": self.seed}
        for name, (index, z) in self._last.items():
            state |= {f"{name}.index": index, f"{name}.z": z.copy()}
        return state

    def restore(self, state: Mapping[str, np.ndarray | int]) -> None:
        """Continue from a ``state``, bit for bit.

        Raises:
            ValueError: The state belongs to another seed or frame shape.
        """
        require(state.get("seed") == self.seed, f"state must be of seed {self.seed}, got {state.get('seed')}")
        last = {}
        for name in (key.removesuffix(".z") for key in state if key.endswith(".z")):
            require(f"{name}.index" in state, f"state must hold {name}.index beside {name}.z")
            z = np.array(state[f"{name}.z"], dtype=np.float64)
            require(z.shape == self.shape, f"{name}.z must have the frame shape {self.shape}, got {z.shape}")
            last[name] = int(state[f"{name}.index"]), z
        self._last = last

    def _draw(self, frames: Sequence[int], stream: int, step: int, kind: str) -> np.ndarray:
        first = frames[0] if len(frames) else -1
        listed = is_index(first) and all(f == first + i for i, f in enumerate(frames))
        require(listed, f"frames must be consecutive indices >= 0, at least one, got {list(frames)}")
        a, level = self.policy.strength, (stream, step)
        if kind == "freenoise":
            return self._stack([self._freenoise_frame(f, level) for f in frames], level).astype(np.float32)
        eps = self._stack(frames, level)
        if kind in RECURSIVE:
            eps = self._recursion(frames, eps, level)
        elif kind == "alternating":
            signs = np.reshape([(-1.0) ** (f % 2) for f in frames], (-1, *(1 for _ in self.shape)))
            eps = a * signs * self._shared(first, level) + math.sqrt(1 - a * a) * eps
        elif kind == "pyoco_mixed":
            eps = (a * self._shared(first, level) + eps) / math.sqrt(1 + a * a)
        elif kind == "zero_sum":
            count = len(frames)
            self.policy.validate(chunk=count)
            eps = (eps - eps.mean(0)) * math.sqrt(count / (count - 1))
        elif kind == "high_pass":
            eps = self._difference(first, eps, level)
        return eps.astype(np.float32)

    def _recursion(self, frames: Sequence[int], eps: np.ndarray, level: tuple[int, int]) -> np.ndarray:
        name = "initial" if level[0] == INITIAL else f"renoise{level[1]}"
        whole = self.policy.scope == "sequence"
        last = self._last.get(name) if whole else None
        z, expected = (None, frames[0]) if last is None else (last[1], last[0] + 1)
        require(frames[0] == expected, f"{name} noise is drawn in order: expected frame {expected}, got {frames[0]}")
        out = np.empty_like(eps)
        for i, frame in enumerate(frames):
            rho = self._rho(frame)
            z = eps[i] if z is None else rho * z + math.sqrt(1 - rho * rho) * eps[i]
            out[i] = z
        if whole:
            self._last[name] = int(frames[-1]), out[-1].copy()
        return out

    def _rho(self, frame: int) -> float:
        a = self.policy.strength
        rho = self.policy.rho if self.policy.kind == "ar1" else a / math.sqrt(1 + a * a)
        if self.policy.rho_schedule == "const" or self.target is None:  # source refuses a decay without a target
            return rho
        return rho * max(0.0, 1 - frame / max(1, self.target - 1))

    def _difference(self, first: int, eps: np.ndarray, level: tuple[int, int]) -> np.ndarray:
        a, out = self.policy.strength, eps.copy()
        out[1:] = (eps[1:] - a * eps[:-1]) / math.sqrt(1 + a * a)
        if first > 0 and self.policy.scope == "sequence":
            out[0] = (eps[0] - a * self._white(*level, first - 1)) / math.sqrt(1 + a * a)
        return out

    def _freenoise_frame(self, frame: int, level: tuple[int, int]) -> int:
        """The frame below ``window`` whose noise this one repeats.

        A uniform shuffle of shuffled frames is a fresh uniform shuffle of the first ones. So each run draws its own
        from the base window: the same distribution, without walking back to it.
        """
        window, stride = self.policy.runs()
        run, offset = divmod(frame, stride)
        if frame < window:
            return frame
        order = self._generator(SHARED, _sequence(level), run, word=1).permutation(stride)
        return run * stride % window + int(order[offset])

    def _shared(self, first: int, level: tuple[int, int]) -> np.ndarray:
        return self._white(SHARED, _sequence(level), first if self.policy.scope == "chunk" else 0)

    def _stack(self, frames: Sequence[int], level: tuple[int, int]) -> np.ndarray:
        return np.stack([self._white(*level, f) for f in frames])

    def _white(self, stream: int, step: int, frame: int) -> np.ndarray:
        draw = self._generator(stream, step, frame).standard_normal(self.shape, dtype=np.float32)
        return draw.astype(np.float64)

    def _generator(self, stream: int, step: int, frame: int, word: int = 0) -> np.random.Generator:
        # the lowest word of the counter runs through the numbers of one draw
        key, counter = [self.seed, stream], [0, frame, step, word]
        bits = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64))
        return np.random.Generator(bits)


def _sequence(level: tuple[int, int]) -> int:
    """A number for the sequence a draw belongs to: 0 for the initial noise, 1 + step between denoising steps."""
    stream, step = level
    return 0 if stream == INITIAL else 1 + step
