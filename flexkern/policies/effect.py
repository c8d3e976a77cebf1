"""Which fields of a policy do nothing, because the values of others leave them without use."""

from .noise import NoisePolicy
from .position import PositionPolicy
from .retention import SinkWindow
from .switch import SwitchPolicy


def idle(policy: object, *, sink: bool) -> list[str]:
    """The fields of a policy that nothing reads at the values of the others; of one of one's own, none is known.

    sink: whether the retention beside it has one.
    """
    if isinstance(policy, PositionPolicy):
        slowed = policy.table is None and policy.mode not in ("none", "jitter")
        stretched = slowed or policy.temperature > 0
        jitters = policy.table is None and policy.mode == "jitter"
        used = {
            "alpha": slowed and policy.mode in ("by_parts", "yarn"),
            "beta": slowed and policy.mode in ("by_parts", "yarn", "hard"),
            "ramp": slowed and policy.mode in ("by_parts", "yarn"),
            "scale": stretched,
            "scale_schedule": stretched and policy.scale == "auto",
            "start": stretched,
            "reach": slowed,
            "riflex_band": slowed and policy.mode == "riflex",
            "jitter_sigma": jitters,
            "jitter_seed": jitters,
            "sink_gap": policy.index == "absolute" and sink,
            "cut_position": policy.index == "slot",
        }
    elif isinstance(policy, NoisePolicy):
        shuffled = policy.kind == "freenoise"
        used = {
            "rho": policy.kind == "ar1",
            "scope": policy.kind not in ("iid", "zero_sum", "freenoise"),
            "rho_schedule": policy.kind in ("ar1", "pyoco_progressive"),
            "apply": policy.kind != "iid",
            "weight": policy.kind in ("alternating", "high_pass", "pyoco_mixed", "pyoco_progressive"),
            "window": shuffled,
            "stride": shuffled,
        }
    elif isinstance(policy, SinkWindow):
        remembers, chooses = policy.evicted == "memory", policy.evicted == "choose"
        used = {
            "sink_rate": policy.evicted == "sink",
            "slow_rate": remembers,
            "fast_rate": remembers,
            "average": remembers,
            "budget": chooses,
            "recent": chooses,
            "reuse": chooses,
        }
    elif isinstance(policy, SwitchPolicy):
        used = {"recent": policy.kind != "keep", "keep_sink": policy.kind == "recache"}
    else:
        used = {}
    return [name for name, needed in used.items() if not needed]
