"""The shapes and dtypes on which the kernels of whole tokens are tried."""

import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
SHAPES = pytest.mark.parametrize(
    "shape",
    [(2, 3, 1, 192), (1, 2, 7, 160), (2, 1, 33, 64), (1, 1, 16, 1536), (1, 2, 3, 5120), (1, 2, 40, 8)],
    ids=lambda s: "B{}-F{}-S{}-C{}".format(*s),
)
