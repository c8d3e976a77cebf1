"""``flexkern presets``: the methods of horizon extension, and what each of them does, in words and in options."""

import textwrap
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from flexkern.cli.errors import refusing
from flexkern.policies import (
    NoisePolicy,
    PositionPolicy,
    Preset,
    RetentionPolicy,
    SinkWindow,
    SwitchPolicy,
    get_preset,
    idle_fields,
)
from flexkern.policies.presets import POLICIES, PRESETS
from flexkern.render.choices import flag

RAMP = "Bands of fewer than {low:g} cycles in training are slowed by s, those of {high:g} or more stay as trained."
SLOWED = {
    "none": "Time passes as it was trained; no band is slowed.",
    "pi": "Every band is slowed by s.",
    "ntk": "Bands are slowed the more the longer their period is, the longest by s.",
    "by_parts": RAMP,
    "yarn": RAMP,
    "hard": "Bands of fewer than {high:g} cycles in training are slowed by s, all others stay as trained.",
    "riflex": "The one band whose period is nearest the training length is slowed until it does not repeat.",
    "jitter": "Every head has speeds of its own, up to {sigma:.0%} off in their base.",
}
STRETCHED = {
    "static": "s is how many times longer the whole video is than training.",
    "dynamic": "s is how many times longer than training the video has become, frame by frame.",
    "per_chunk": "s is how many times longer than training the video has become, chunk by chunk; 1 until then.",
}
EVICTED = {
    "drop": "",
    "sink": " What leaves is merged into the first frames, the i-th that leaves into the i-th of them.",
    "memory": " What leaves is merged into two frames more, a slow and a fast one.",
    "choose": " Once full, it is left with {budget}: the first, the last {recent}, and single tokens of the others.",
    "sweep": " Behind them come the last {last}; places of older ones show the first again, forwards and back.",
}
NOISES = {
    "iid": "Every frame starts from noise of its own.",
    "ar1": "The noise of a frame is correlated by {rho:g} with that of the frame before{anti}.",
    "alternating": "A shared noise is added with a sign that changes from frame to frame.",
    "zero_sum": "The noises of a chunk's frames sum to zero.",
    "high_pass": "The noise of a frame is what differs from the frame before.",
    "pyoco_mixed": "All frames share a part of their noise.",
    "pyoco_progressive": "The noise of a frame carries on a part of that of the frame before.",
    "freenoise": "Noise is drawn for {window} frames, and later frames shuffle it.",
}
SWITCHES = {
    "keep": "A new prompt leaves what is remembered as it is.",
    "recache": "A new prompt has the last {recent} frames run again with it{sink}.",
    "flush": "A new prompt forgets all but the first frames that stay and the last {recent}.",
}
PLAIN = {
    "position.mode": "how bands, the speeds at which attention counts time, are slowed",
    "position.train_len": "latent frames that the model was trained on",
    "position.alpha": "cycles in training below which a band is slowed",
    "position.beta": "cycles in training from which a band stays as trained",
    "position.ramp": "how it goes from one to the other between them",
    "position.scale": "s, how much is slowed; auto follows scale-schedule",
    "position.scale_schedule": "what s follows",
    "position.start": "always, or past: not before the video outgrows training",
    "position.reach": "all distances are slowed, or beyond: only those that training never saw",
    "position.logit_temp": "how much attention is sharpened as s grows",
    "position.table": "the speed of each band, in place of a mode",
    "position.index": "absolute: counted in the video; slot: counted in the window",
    "position.sink_gap": "how many frames lie between the sink, which moves along, and the rest; none: it stays",
    "position.base": "base of the model's speeds",
    "position.riflex_band": "the one band that is slowed, from 0; none: found by its period",
    "position.jitter_sigma": "how far heads differ",
    "position.jitter_seed": "seed of these differences",
    "position.cut_position": "where the first frame after a scene cut sits",
    "retention.sink": "first frames, which stay for good",
    "retention.window": "latent frames seen in all, those and the current chunk included",
    "retention.evicted": "what becomes of frames that are not recent any more",
    "retention.sink_rate": "share of a frame that leaves in the first frame it is merged into",
    "retention.slow_rate": "share of frames that leave in the slow memory frame",
    "retention.fast_rate": "share of frames that leave in the fast memory frame",
    "retention.budget": "latent frames left of a full window, those and the current chunk included",
    "retention.recent": "last frames, the current chunk included, which stay whole and choose",
    "retention.reuse": "how many times a token may be chosen",
    "retention.average": "their mean: over all tokens, or frames: place by place",
    "noise.kind": "how the noises of frames belong together",
    "noise.rho": "correlation with the frame before",
    "noise.scope": "sequence: over the whole video; chunk: within each chunk",
    "noise.rho_schedule": "const, or linear_decay: to 0 at the end of the video",
    "noise.apply": "whether noise between denoising steps follows the kind as well",
    "noise.weight": "how much is shared",
    "noise.window": "latent frames with noise of their own",
    "noise.stride": "latent frames shuffled together",
    "switch.kind": "what a new prompt does with remembered frames",
    "switch.recent": "how many of the last frames that concerns",
    "switch.keep_sink": "whether the first frames keep the old prompt",
}


@dataclass(kw_only=True)
class Presets:
    """List the presets: methods of horizon extension, each four policies under a name; or show one of them."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """the preset to show, with every value; default: list them all"""

    def run(self) -> int:
        if self.name is None:
            for preset in PRESETS.values():
                print(f"{preset.name:18} {preset.doc}\n{'':18} {preset.source}")
            return 0
        with refusing(ValueError):
            preset = get_preset(self.name)
        print("\n".join(describe(preset)))
        return 0


def describe(preset: Preset) -> list[str]:
    """Lines that say what a preset does, and which option of ``flexkern render`` holds which value."""
    given, preset = preset, preset.resolve()
    lines = [f"{preset.name}: {preset.doc}", f"Source: {preset.source}", ""]
    follows = False
    for sentence in sentences(preset):
        lines += textwrap.wrap(sentence, 100, initial_indent="  ", subsequent_indent="    ")
    idle = idle_fields(preset)
    for policy in POLICIES:
        lines.append("")
        used = getattr(preset, policy)
        for field in fields(used):
            option = flag(f"{policy}.{field.name}")
            if f"{policy}.{field.name}" in idle:
                continue
            value = getattr(used, field.name)
            if value is not None and getattr(getattr(given, policy), field.name) is None:
                option, follows = f"* {option}", True
            lines.append(f"{f'{option} {shown_value(value)}':38} {PLAIN[f'{policy}.{field.name}']}".rstrip())
    stars = ["* follows another value, or the model, unless it is given"] * follows
    without = textwrap.wrap(
        f"Without effect in {preset.name}: {', '.join(map(flag, idle))}", 100, break_on_hyphens=False
    )
    return [*lines, "", *stars, *without, "flexkern render --preset NAME --help says all of each option."]


def sentences(preset: Preset) -> list[str]:
    """What the values of a preset mean."""
    return [
        *_positions(preset.position, preset.retention),
        _memory(preset.retention),
        _noise(preset.noise),
        _switch(preset.switch),
    ]


def shown_value(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, tuple):
        return " ".join(map(shown_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _positions(position: PositionPolicy, retention: RetentionPolicy) -> list[str]:
    within = f"inside the window, 0 to {retention.capacity - 1}, and never grow"
    counted = within if position.index == "slot" else "from the start of the video"
    told = [f"Positions in time count {counted}; the model was trained on {position.train_len} latent frames."]
    if position.index == "absolute" and position.sink_gap is not None and retention.pinned:
        told.append(f"The first frames move along with the video, {position.sink_gap} frames before the others.")
    if position.table is not None:
        return [*told, "Bands are slowed by the given table."]
    low, high = position.thresholds
    told.append(SLOWED[position.mode].format(low=low, high=high, sigma=position.jitter_sigma))
    if position.mode not in ("none", "jitter"):
        fixed = f"s, by how much the video outgrows training, is fixed at {position.scale}."
        told.append(STRETCHED[position.scale_schedule] if position.scale == "auto" else fixed)
        if position.start == "past":
            told.append("Nothing is slowed before the video outgrows training.")
        if position.reach == "beyond":
            told.append(f"Distances below {position.train_len} frames are not slowed.")
    return told


def _memory(retention: RetentionPolicy) -> str:
    pinned, seen = retention.pinned, retention.capacity
    first = "the first frame" if pinned == 1 else f"the first {pinned} frames"
    kind = retention.evicted if isinstance(retention, SinkWindow) else "drop"
    stays = f"; {first} of the video stay{'s' * (pinned == 1)}{' for good' * (kind != 'sink')}" if pinned else ""
    told = f"A frame sees {seen} latent frames in all, its own chunk included{stays}."
    if not isinstance(retention, SinkWindow):
        return told
    return told + EVICTED[kind].format(budget=retention.budget, recent=retention.recent, last=seen - pinned)


def _noise(noise: NoisePolicy) -> str:
    anti = " (antiphase noise)" if noise.rho < 0 else ""
    return NOISES[noise.kind].format(rho=noise.rho, anti=anti, window=noise.window)


def _switch(switch: SwitchPolicy) -> str:
    sink = "; the first frames keep the old one" if switch.keep_sink else ""
    return SWITCHES[switch.kind].format(recent=switch.recent, sink=sink)
