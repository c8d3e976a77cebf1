"""Doors into other people's code: each replaces what it names, can be undone, and refuses what it does not know."""
