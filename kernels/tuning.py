"""Which kernel computes a product of a few rows, and with which tiles: measured on a GPU and stored for it, or guessed.

`python -m headrace.benchmarks.tune` measures and writes `kernels/tuned/<name of the GPU>.json`:

    {"gpu": "NVIDIA H200", ..., "linear": [{"rows": 1, "n": 6144, "k": 4096, "gated": false, "itemsize": 2,
      "kernel": "gemv", "block_n": 4, "block_k": 2048, "warps": 8, "stages": 1, "splits": 1, "us": 13.2, ...}, ...]}

Nothing is measured at start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch

__all__ = [
    "GEMV_ROWS",
    "KEPT",
    "MOST_ROWS",
    "LinearShape",
    "Tiles",
    "guess",
    "parse_table",
    "read_table",
    "row_bucket",
    "table_name",
    "tiles_for",
    "whole_splits",
]

MOST_ROWS = 256  # more share a weight so well that it is not what a product waits for
_GUESSED_ROWS = 128  # above, it takes a measurement to tell
KEPT = 8192  # values of a row that a program can keep; of more, too few rows of the weight would be on their way
GEMV_ROWS = 4  # each costs the cores one multiplication a weight, which is about as long as it takes to come
_BUCKETS = (1, 2, 4, 16, 32, 64, 128, 256)

_SMALL = 2**23  # weights of a product that takes no longer than the launches around it
_FEW = 2**22  # weights that do not keep a GPU busy in tiles of four rows

_TILE_ROWS = 64  # of x, on one side of a tensor core; more are cut into tiles where a weight is small

_INTERPRETED_ROWS = 64  # of a weight
_INTERPRETED_PROGRAMS = 2

# What stands in for a GPU that is not known: the smallest of today's data centers.
_PROCESSORS = 108
_SHARED_MEMORY = 100 * 1024


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A product as tiles depend on it.

    Attributes:
        rows: of x, rounded up by `row_bucket`.
        n: values that come out.
        k: values that go in.
        gated: whether the weight has two rows for each value that comes out.
        itemsize: bytes of a weight.
        fp8: whether that one byte is of fp8, which may have tiles of its own; else it has those of int8.
    """

    rows: int
    n: int
    k: int
    gated: bool
    itemsize: int
    fp8: bool = False


@dataclass(frozen=True, slots=True)
class Tiles:
    """How it is computed.

    Attributes:
        kernel: gemv, keep and skinny are ours (`headrace.kernels.ops`); torch leaves it to PyTorch, with our kernels
            around.
        block_n: rows of the weight that a program takes, with a gate as many twice.
        block_k: depth of a tile.
        warps: of a program.
        stages: tiles in flight.
        splits: parts of the depth that are programs of their own.
        programs: that share the rows of the weight among them (keep).
        early: whether a program's first tile of the weight is fetched before the kernel before is done (skinny).
        ahead: whether all of its tiles are asked into the L2 cache before that (skinny).
        block_m: rows of x that a program takes (skinny); 0 for all.
    """

    kernel: Literal["gemv", "keep", "skinny", "torch"]
    block_n: int = 0
    block_k: int = 0
    warps: int = 0
    stages: int = 1
    splits: int = 1
    programs: int = 0
    early: bool = False
    ahead: bool = False
    block_m: int = 0


def row_bucket(rows: int) -> int:
    """The number of rows for which so many are computed."""
    return next(bucket for bucket in _BUCKETS if rows <= bucket)


@cache
def tiles_for(shape: LinearShape, device: torch.device) -> Tiles:
    """How to compute it on a device: as its table says, otherwise as guessed."""
    if device.type != "cuda":
        return _interpreted(guess(shape, _PROCESSORS, _SHARED_MEMORY))
    gpu = torch.cuda.get_device_properties(device)
    table = read_table(table_name(gpu.name))
    stored = table.get(shape) or table.get(replace(shape, fp8=False))
    shared_memory = getattr(gpu, "shared_memory_per_block_optin", _SHARED_MEMORY)
    return stored or guess(shape, gpu.multi_processor_count, shared_memory)


def guess(shape: LinearShape, processors: int, shared_memory: int) -> Tiles:
    """What is likely to be good: learned from what was measured on an H200."""
    if shape.rows == 1 and shape.itemsize < 4 and shape.k <= KEPT and (shape.gated or shape.n > shape.k):
        return _guess_keep(shape, processors)
    if shape.rows <= 2 or (shape.rows <= GEMV_ROWS and (shape.itemsize == 4 or not shape.gated)):
        return _guess_gemv(shape)
    if shape.itemsize == 4:
        return Tiles("torch")  # exact products of float32 are not for tensor cores
    if shape.itemsize == 2 and (shape.rows > _GUESSED_ROWS or (shape.rows > _TILE_ROWS and shape.n * shape.k > _SMALL)):
        return Tiles("torch")  # what is quantized would have to be made 16-bit first
    return _guess_skinny(shape, processors, shared_memory)


def _interpreted(tiles: Tiles) -> Tiles:
    """For Triton's interpreter, which takes as long for a program of a few rows as for one of many."""
    if tiles.kernel == "keep":
        return replace(tiles, block_n=_INTERPRETED_ROWS, programs=_INTERPRETED_PROGRAMS)
    return replace(tiles, block_n=_INTERPRETED_ROWS) if tiles.kernel == "gemv" else tiles


def _guess_keep(shape: LinearShape, processors: int) -> Tiles:
    """For what is likely to come after a norm: products with fewer rows in than out."""
    block_k = 1 << (shape.k - 1).bit_length()
    warps = max(1, min(8, block_k // 512))
    rows = 32 * 32 * warps // block_k // (2 if shape.gated else 1)  # of which a thread holds 32 values
    return Tiles("keep", block_n=max(1, rows), block_k=block_k, warps=warps, programs=3 * processors)


def _guess_gemv(shape: LinearShape) -> Tiles:
    width = 32 * 16 // shape.itemsize  # weights that a warp loads at once
    # Tiles as deep as a program is wide; the widest that leaves little of the last one empty.
    fitting = (warps for warps in (8, 4, 2, 1) if _padded(shape.k, width * warps) <= 1.1 * shape.k)
    warps = next(fitting, 4 if shape.k > 2 * width else 1)
    few = shape.gated or shape.n * shape.k < _FEW
    return Tiles("gemv", block_n=2 if few else 4, block_k=width * warps, warps=warps)


def _guess_skinny(shape: LinearShape, processors: int, shared_memory: int) -> Tiles:
    block_n, block_k = 64, 64 if shape.gated and shape.itemsize > 1 else 128
    block_m = _TILE_ROWS if shape.rows > _TILE_ROWS else 0
    columns, rows = block_n * (2 if shape.gated else 1), max(16, block_m or shape.rows)
    stage = (columns * shape.itemsize + rows * max(2, shape.itemsize)) * block_k  # rows in 8 bits come in two halves
    most = 6 if shape.rows <= 16 else 3 if block_m else 4  # of short kernels, the next one's programs shall find room
    stages = max(2, min(most, shared_memory // stage))
    tiles = -(-shape.n // block_n) * -(-shape.rows // (block_m or shape.rows))
    splits = whole_splits(shape.k, block_k, max(1, min(8, processors // tiles)))
    return Tiles("skinny", block_n, block_k, 4, stages, splits, block_m=block_m)


def whole_splits(k: int, block_k: int, splits: int) -> int:
    """About so many parts of a depth, of which each is whole tiles and none is empty."""
    steps = -(-k // block_k)
    return -(-steps // -(-steps // splits))


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def table_name(gpu: str) -> str:
    """File of a GPU's table."""
    return gpu.lower().replace(" ", "-") + ".json"


@cache
def read_table(name: str) -> Mapping[LinearShape, Tiles]:
    """The stored tiles; none if there is no such table."""
    file = resources.files("headrace.kernels") / "tuned" / name
    if not file.is_file():
        return {}
    return parse_table(json.loads(file.read_text(encoding="utf-8")))


def parse_table(table: dict[str, Any]) -> dict[LinearShape, Tiles]:
    """The tiles in a table."""
    found = {}
    for row in table["linear"]:
        shape = LinearShape(**{field: row[field] for field in LinearShape.__slots__ if field in row})
        found[shape] = Tiles(**{field: row[field] for field in Tiles.__slots__ if field in row})
    return found
