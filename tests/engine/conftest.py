"""The tiny transformer that the recorded pipelines were recorded with, and an engine of it."""

from pathlib import Path

import pytest
from both_loops import SIZE
from safetensors.torch import load_file

from flexkern.engine import Engine
from flexkern.model.wan import CONFIGS, CausalWan

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def model():
    model = CausalWan(CONFIGS["tiny"])
    model.load_state_dict(load_file(DATA / "tiny_wan.safetensors"))
    return model.eval().requires_grad_(False)


@pytest.fixture
def engine(model):
    return Engine(model, size=SIZE)
