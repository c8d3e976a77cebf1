"""What the published pipelines computed at a tiny size in float32: how tests/data is read.

Reward-Forcing at 4317f5a0d29d, MemRoPE at b89bf5b87ca8, Rolling Sink at 6eaed1e79613 and Deep Forcing (its "code
release", ea9961a) were run on a CPU with 16 tokens a frame, where their code says 1560, and torch's attention in place
of flash-attn.
"""

from pathlib import Path

DATA = Path(__file__).parent.parent / "data"
TOLERANCE = 1e-4
PRESETS = {  # by recording: the preset that does the same, and what of it differs
    "sf_global": ("self-forcing", {}),
    "sf_local": ("self-forcing", {"retention.window": 6}),
    "longlive_inf": ("longlive-infinite", {"retention.window": 9}),
    "reward_forcing": ("reward-forcing", {}),
    "memrope": ("memrope", {}),
    "rolling_sink": ("rolling-sink", {}),
    "deep_forcing": ("deep-forcing", {}),
    "deep_sink": ("deep-sink", {}),
}


class RecordedNoise:
    """The noise the pipeline drew, in its order."""

    def __init__(self, tensors):
        self.tensors, self.drawn = tensors, 0

    def initial(self, frames):
        return self.tensors["noise"][:, frames]

    def renoise(self, frames, step):
        self.drawn += 1
        return self.tensors[f"fresh_noise.{self.drawn - 1}"][None]
