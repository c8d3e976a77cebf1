"""What leaves a session is an ordinary tensor, whatever mode it was computed in."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def without_gradients(function: Function) -> Function:
    """The function, run without gradients and outside of inference mode, also where its caller is in it.

    Tensors made in inference mode raise where code outside of it changes them in place or trains on them. So only the
    passes of a model run in that mode: what is computed from their results out here is ordinary.
    """
    outside: Function = torch.inference_mode(False)(torch.no_grad()(function))  # it would enable gradients
    return outside


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
