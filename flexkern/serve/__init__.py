"""Renders for others: a farm of workers, and videos over HTTP, from a queue that outlives its server.

What needs the extra ``serve`` is imported by the modules that use it: this package alone imports nothing.
"""
