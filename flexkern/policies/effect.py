"""Which fields of a preset do nothing, because the values of others leave them without use."""

from .noise import NoisePolicy
from .position import PositionPolicy
from .presets import POLICIES, Preset, SwitchPolicy


def idle_fields(preset: Preset) -> tuple[str, ...]:
    """The dotted names of the fields that could have any other value and the videos would be the same.

    Args:
        preset: The method, with its overrides.

    Returns:
        Names as ``get_preset`` takes them, in the order of the policies and their fields.
    """
    return tuple(f"{policy}.{name}" for policy in POLICIES for name in _idle(getattr(preset, policy)))


def _idle(policy: object) -> list[str]:
    """The fields of a policy that nothing reads at the values of the others; of one of one's own, none is known."""
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
    elif isinstance(policy, SwitchPolicy):
        used = {"recent": policy.kind != "keep", "keep_sink": policy.kind == "recache"}
    else:
        used = {}
    return [name for name, needed in used.items() if not needed]
