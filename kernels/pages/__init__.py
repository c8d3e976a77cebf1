"""Kernels that write the pages of a cache."""

from .. import require_triton

require_triton()
