"""Kernels that read each token once and write it once."""
