"""Tiles that ``flexkern warmup --tune`` found on this machine, kept in a file beside Triton's cache.

A tile holds for one GPU, by its name, and one Triton, by its version: another compiler may want another tile. The file
is JSON, written whole or not at all, and read once a process. One that is damaged, or that something else wrote, is
named in a warning and not used: the tiles of the table are.
"""

import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from ..gpus import dtype_name
from .tiles import Config

NAME, FORMAT = "flexkern-tiles.json", 1
SIDES, WARPS = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTile:
    """A tile, what it was found for, and what it took there."""

    gpu: str
    triton: str
    head_dim: int
    dtype: str
    config: Config
    ms: float
    shape: str
    """in words, for whoever reads the file"""

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What at most one tile of a file is for."""
        return self.gpu, self.triton, self.head_dim, self.dtype


def kept_file() -> Path:
    """Where tiles are kept: ~/.triton/flexkern-tiles.json, unless Triton's cache is elsewhere."""
    return Path(triton.knobs.cache.dir).with_name(NAME)


@cache
def find_kept(gpu: str, head_dim: int, dtype: torch.dtype) -> KeptTile | None:
    """The tile that was kept for that GPU and the installed Triton; None where there is none."""
    key = gpu, triton.__version__, head_dim, dtype_name(dtype)
    return next((tile for tile in read_kept(kept_file()) if tile.key == key), None)


@cache
def read_kept(path: Path) -> tuple[KeptTile, ...]:
    """Every tile in the file, none where there is no file. Warns of one that is not as ``keep_tile`` writes it."""
    try:
        return tuple(map(_tile_of, _entries_of(json.loads(path.read_bytes()))))
    except FileNotFoundError:
        return ()
    except Exception as error:  # a file on somebody's disk may be anything, and must end no render
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warnings.warn(f"{path} is not used, nor the tiles in it ({why}): delete it, or tune again", stacklevel=2)
        return ()


def keep_tile(tile: KeptTile, path: Path | None = None) -> Path:
    """Write the tile into the file, in place of one for the same GPU, Triton, head dim and dtype.

    Args:
        tile: What to keep.
        path: The file; ``kept_file()`` by default.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written. An older file is then as it was.
    """
    path = path or kept_file()
    others = [other for other in read_kept(path) if other.key != tile.key]
    content = {"format": FORMAT, "tiles": [asdict(one) for one in (*others, tile)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    read_kept.cache_clear()
    find_kept.cache_clear()
    return path


def _entries_of(content: Any) -> list[dict[str, Any]]:
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("tiles"), list):
        raise ValueError(f'expected an object with "format": {FORMAT} and a list "tiles"')
    return content["tiles"]


def _tile_of(entry: dict[str, Any]) -> KeptTile:
    """A tile of the file. Raises where something is missing, of another type, or no size of a tile."""
    config = entry["config"]
    expected = {field.name: field.type for field in fields(Config)}
    if set(config) != set(expected) or any(type(config[name]) is not kind for name, kind in expected.items()):
        raise ValueError(f"expected a tile with {', '.join(expected)}, got {config}")
    sizes = config["block_m"] in SIDES and config["block_n"] in SIDES and config["num_warps"] in WARPS
    if not (sizes and 1 <= config["num_stages"] <= 8 and 1 <= config["per_sm"] <= 8):
        raise ValueError(f"no such tile: {config}")
    words = ("gpu", "triton", "dtype", "shape")
    if not all(isinstance(entry[name], str) for name in words) or type(entry["head_dim"]) is not int:
        raise ValueError(f"expected text for {', '.join(words)} and a whole head_dim, got {entry}")
    return KeptTile(**{**entry, "config": Config(**config), "ms": float(entry["ms"])})
