"""The methods that the evidence compares: presets, the parts of FLEX, and FLEX with each open choice made otherwise."""

from dataclasses import dataclass

import machine  # noqa: F401  makes this tree importable as flexkern

from flexkern.policies import Preset, get_preset

PLAIN, SINK, FLEX = "self-forcing", "sink", "flex"
ALL = "flex, all distances"  # slowed, those inside the window too: the equation as it stands in the paper


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method under a name of its own: a preset, and the fields in which it differs."""

    name: str
    base: str = "flex"
    overrides: tuple[tuple[str, object], ...] = ()

    @property
    def preset(self) -> Preset:
        """Policies as the engine takes them."""
        return get_preset(self.base, dict(self.overrides))


def variant(name: str, base: str = "flex", **fields: object) -> Variant:
    """``position__alpha=0.1`` overrides position.alpha."""
    return Variant(name=name, base=base, overrides=tuple((k.replace("__", "."), v) for k, v in fields.items()))


NO_BANDS, NO_NOISE, NO_SINK = {"position__mode": "none"}, {"noise__kind": "iid"}, {"retention__sink": 0}
FAR = {"position__reach": "all"}
PARTS = (  # of ALL: each alone, each pair, all: what is left of flex where the others are taken away
    variant(PLAIN, PLAIN),
    variant("bands", **FAR, **NO_NOISE, **NO_SINK),
    variant("noise", **NO_BANDS, **NO_SINK),
    variant(SINK, **NO_BANDS, **NO_NOISE),
    variant("bands + noise", **FAR, **NO_SINK),
    variant("bands + sink", **FAR, **NO_NOISE),
    variant("noise + sink", **NO_BANDS),
    variant(ALL, **FAR),
)
CHOICES = (  # of ALL, but for the first two
    variant(FLEX),
    variant("flex without noise", **NO_NOISE),
    variant("sink at slots", position__index="slot", **NO_BANDS, **NO_NOISE),
    variant("alpha 0.05, beta 0.25", **FAR, position__alpha=0.05, position__beta=0.25),
    variant("alpha 0.05, beta 0.25, no noise", **FAR, position__alpha=0.05, position__beta=0.25, **NO_NOISE),
    variant("alpha 0.5, beta 2", **FAR, position__alpha=0.5, position__beta=2.0),
    variant("ramp smooth", **FAR, position__ramp="smooth"),
    variant("ramp cosine", **FAR, position__ramp="cosine"),
    variant("hard step at beta", **FAR, position__mode="hard"),
    variant("pi's bands", **FAR, position__mode="pi"),
    variant("scale static", **FAR, position__scale_schedule="static"),
    variant("scale dynamic", **FAR, position__scale_schedule="dynamic"),
    variant("scale 2", **FAR, position__scale=2.0),
    variant("scale 2, no noise", **FAR, position__scale=2.0, **NO_NOISE),
    variant("scale 4", **FAR, position__scale=4.0),
    variant("start past the horizon", **FAR, position__start="past"),
    variant("rho -0.3", **FAR, noise__rho=-0.3),
    variant("rho -0.9", **FAR, noise__rho=-0.9),
    variant("rho +0.7", **FAR, noise__rho=0.7),
    variant("noise per chunk", **FAR, noise__scope="chunk"),
    variant("noise on every step", **FAR, noise__apply="initial+renoise"),
    variant("sink 1", **FAR, retention__sink=1),
    variant("sink 6", **FAR, retention__sink=6),
    variant("window 12", **FAR, retention__window=12),
    variant("window 15", **FAR, retention__window=15),
)
