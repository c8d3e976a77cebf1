"""Memory-bound kernels: each token is read once and written once."""
