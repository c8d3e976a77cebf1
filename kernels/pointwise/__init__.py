"""Memory-bound kernels: each token is read once and written once."""

from .. import require_triton

require_triton()
