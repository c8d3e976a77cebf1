"""Patches for Self-Forcing, LongLive and diffusers: reversible, and refused for versions they do not know."""
