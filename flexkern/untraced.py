"""What torch.compile must not trace: work of the host in NumPy, which it would compute otherwise, after minutes.

Import it in traced code only, inside ``if torch.compiler.is_compiling()``: it loads the compiler.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

import torch

WHY = "angles come from the host: for one graph, call frame_turns outside of torch.compile and pass turn"
Value = TypeVar("Value")


def _call(function: Callable[..., Value], *args: Any, **named: Any) -> Value:
    """What the function gives, run as it is: torch.compile breaks its graph there, and with fullgraph refuses."""
    return function(*args, **named)


_said = {"reason": WHY} if "reason" in signature(torch.compiler.disable).parameters else {}  # from torch 2.7 or so
call = torch.compiler.disable(_call, **_said)
