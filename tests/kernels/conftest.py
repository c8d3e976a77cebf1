"""Triton's interpreter as strict as that of Triton 3.9, whichever is installed."""

import numpy as np
import pytest
import torch

from flexkern.kernels import PORTABLE, lacking


def is_interpreted() -> bool:
    try:
        return not torch.cuda.is_available() and lacking(PORTABLE) is None
    except ImportError:
        return False


@pytest.fixture(autouse=True)
def strict_masks(monkeypatch):
    """A mask is of bools: older interpreters take integers, into which they turn a bool of one number made wide."""
    if not is_interpreted():
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def strict(original, at):
        def checked(builder, *given, **named):
            dtype = np.asarray(given[at].data).dtype  # of a handle's array, or of a descriptor's own
            assert np.issubdtype(dtype, np.bool_), f"a mask of {dtype}, expected bool"
            return original(builder, *given, **named)

        return checked

    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(InterpreterBuilder, name, strict(getattr(InterpreterBuilder, name), at))
