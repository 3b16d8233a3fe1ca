"""How decodes are cut for their kernel: keys of a tile, parts of contexts, and the way that tiles take to the cores.

Measured in whole layers of Llama-8B and 1B, GPT-2 XL, OPT-6.7B and Falcon-7B on an H200. Few programs wait for memory:
their tiles go through registers, each while the last is computed with, the first even before the query is there. Many
programs share the rate of the memory: theirs go through shared memory, several at a time, and are small, so that more
programs find room; at batch 16 and 64 that was worth 2 to 7 % of a layer with heads of 128 values.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_SPLITS", "DecodeTiles", "decode_tiles"]

MOST_SPLITS = 32  # parts of one context; more cost more to join than they save

_FEW = 66  # programs, half of the processors of the largest GPUs
_WANTED_OF_FEW = 264  # of which there is room for two on a processor
_SOME = 198  # programs, up to which contexts are still cut into two parts of large tiles, or more
_WANTED_OF_SOME = 396
_WANTED_OF_MANY = 528

# Keys of a tile, warps and stages by bytes of a value and padded head size. Exact products of float32 are not for
# tensor cores; their operands stand in registers, which fewer warps would overflow.
_OF_FEW = {
    (2, 64): (64, 4),
    (2, 128): (64, 4),
    (2, 256): (32, 4),
    (4, 64): (32, 8),
    (4, 128): (32, 8),
    (4, 256): (32, 8),
}
# Of heads that share keys: 0.5 to 2 % less of a step of Llama-8B, and behind 700 to 8,000 tokens 1 to 7 % of Llama-1B.
_OF_FEW_SHARED = {(2, 64): (128, 4), (2, 128): (64, 8)}
_OF_SOME = {(2, 128): (64, 4, 3)}  # 1 % less of a layer of Llama-8B at batch 16 than small tiles in four parts
_OF_MANY = {
    (2, 64): (64, 4, 4),
    (2, 128): (32, 4, 4),
    (2, 256): (32, 4, 3),
    (4, 64): (32, 8, 2),
    (4, 128): (32, 8, 2),
    (4, 256): (32, 8, 1),
}
_OF_MANY_SINGLE = {(2, 64): (64, 2, 3)}  # heads that share no keys have so little to compute that two warps do


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """A way to compute decodes.

    Attributes:
        columns: keys of a tile.
        warps: of a program.
        stages: tiles on their way at a time.
        ahead: whether they go through registers.
        splits: parts into which contexts are cut at most.
    """

    columns: int
    warps: int
    stages: int
    ahead: bool
    splits: int


def decode_tiles(itemsize: int, dims: int, heads: int, programs: int, capacity: int) -> DecodeTiles:
    """The best that is known.

    Args:
        itemsize: bytes of a value.
        dims: values of a head, padded to a power of two.
        heads: queries that a program holds.
        programs: how many there are if contexts stay whole.
        capacity: tokens for which block tables have room.
    """
    key = (itemsize, max(dims, 64))
    if programs <= _FEW:
        columns, warps = (_OF_FEW | (_OF_FEW_SHARED if heads > 1 else {}))[key]
        return DecodeTiles(columns, warps, 1, True, _splits(_WANTED_OF_FEW // programs, capacity, columns))
    if programs <= _SOME and key in _OF_SOME:
        columns, warps, stages = _OF_SOME[key]
        return DecodeTiles(columns, warps, stages, False, _splits(_WANTED_OF_SOME // programs, capacity, columns))
    columns, warps, stages = (_OF_MANY | (_OF_MANY_SINGLE if heads == 1 else {}))[key]
    return DecodeTiles(columns, warps, stages, False, _splits(_WANTED_OF_MANY // programs, capacity, columns))


def _splits(wanted: int, capacity: int, columns: int) -> int:
    """No more than there are tiles."""
    return max(1, min(MOST_SPLITS, wanted, -(-capacity // columns)))
