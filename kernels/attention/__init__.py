"""Attention over the pages of a cache: the portable Triton kernel and the Hopper kernel, and what they share."""

from .. import require_triton

require_triton()
