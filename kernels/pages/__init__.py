"""Kernels that write the pages of a cache."""
