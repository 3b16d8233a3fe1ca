"""Which products a model computes a few rows of, and which ways to compute one are worth a try. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from headrace.benchmarks.shapes import find_source

__all__ = ["Candidate", "Product", "candidates_of", "products_of"]

_WITH_HEADS = {"BertModel": "BertForMaskedLM"}

# By bytes of a weight: depths and warps of a program whose threads each load 16 bytes of a row at once, or 32; of one
# byte also 8, which are as many values as 16 of two bytes.
_GEMV_DEPTHS = {
    2: [(256, 1), (512, 2), (1024, 4), (2048, 8), (512, 1), (2048, 4)],
    1: [
        *[(512, 1), (1024, 2), (2048, 4), (4096, 8), (1024, 1), (4096, 4)],
        *[(256, 1), (512, 2), (1024, 4), (2048, 8)],
    ],
}
_FEWEST_VALUES, _MOST_BYTES = 32, 128  # of weights that a thread loads at once
# By the most rows for which they are tried: rows of the weight, depth, warps and stages.
_SKINNY = {
    16: [(64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (32, 256, 4, 4)],
    64: [(64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 8, 3), (32, 128, 4, 4)],
    128: [(128, 64, 8, 4), (64, 64, 4, 4)],
    256: [],
}
_SKINNY_GATED = {
    16: [(64, 128, 4, 3), (64, 64, 4, 5), (32, 128, 4, 4)],
    64: [(64, 64, 4, 4), (64, 128, 4, 3), (32, 128, 4, 3)],
    128: [(64, 64, 8, 3)],
    256: [],
}
# The same, and rows of x in front, for small weights, whose tiles are too few if all rows are in each. What programs
# read together grows as tiles get smaller, what the last one adds up as the depth is cut: one of these is best, and
# which one depends on the shape. All stay below half of a processor's shared memory, so that the next kernel's
# programs find room before they are done.
_ROW_TILES = [
    *[(64, 64, 128, 4, 3), (64, 64, 64, 4, 6), (64, 128, 64, 8, 4), (128, 64, 64, 8, 4)],
    *[(64, 32, 128, 4, 4), (64, 32, 64, 4, 8), (32, 64, 128, 4, 4), (32, 32, 128, 4, 6), (16, 64, 128, 4, 4)],
]
_ROW_TILES_GATED = [(64, 64, 64, 4, 4), (64, 32, 128, 4, 3), (32, 64, 64, 4, 5), (32, 32, 128, 4, 4)]
_FEWEST_CUT_ROWS = 64
_SMALL = 2**24  # weights
# For large ones, rows that do not fit into one tile.
_LARGE_TILES = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 8, 4), (256, 64, 64, 8, 4)]
_LARGE_TILES_GATED = [(128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 128, 64, 8, 3)]
# Of weights in 8 bits besides: for few rows deeper tiles, and for many all that may be good, since the other way is to
# make the whole weight 16-bit first.
_DEEP_TILES = {
    16: [(64, 256, 4, 4), (64, 256, 8, 4), (128, 128, 8, 4)],
    64: [(64, 256, 4, 3), (64, 256, 8, 3), (128, 128, 8, 4)],
}
_DEEP_TILES_GATED = {
    16: [(64, 128, 4, 4), (64, 256, 8, 3)],
    64: [(64, 128, 4, 4), (64, 128, 8, 3)],
}
_NARROW_TILES = [*product((64, 128, 256), (64, 128), (64, 128), (4, 8), (3, 4))]
_MOST_SUMS = 128  # of a thread, in registers
_SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Product:
    """A product of a model, with what is around it; the weight is of `dtype`, or quantized by `scheme`."""

    n: int
    k: int
    gated: bool
    scheme: str | None = None
    norm: Any = field(compare=False, default=None)
    activation: Any = field(compare=False, default=None)
    bias: bool = field(compare=False, default=False)
    residual: bool = field(compare=False, default=False)
    dtype: str = field(compare=False, default="bfloat16")

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 2 if self.scheme is None else 1


@dataclass(frozen=True)
class Candidate:
    """One way to compute a product of so many rows."""

    product: Product
    rows: int
    tiles: Any

    @property
    def shape(self) -> Any:
        """Of the table."""
        from headrace.kernels.tuning import LinearShape

        found = self.product
        return LinearShape(self.rows, found.n, found.k, found.gated, found.itemsize, fp8=found.scheme == "fp8")


def products_of(name: str, scheme: str | None = None) -> Iterator[Product]:
    """The products of a few rows that a decode step of a model computes.

    Args:
        name: of the shape.
        scheme: of the weights, if they are quantized; heads are left out then, which are not.
    """
    from headrace.benchmarks.models import config_of
    from headrace.kernels.policies import find_policy

    config = config_of(find_source(name))
    config.architectures = [_WITH_HEADS.get(config.architectures[0], config.architectures[0])]
    spec = find_policy(config.architectures[0]).spec(config)
    layer, hidden = spec.layers[0], spec.hidden_size
    norm = None if layer.placement == "post" or layer.residual_from_norm else layer.norm
    heads = layer.attention
    make = partial(Product, scheme=scheme, dtype=find_source(name).dtype)
    yield make(heads.qkv_size, hidden, False, norm=norm, bias=heads.qkv_bias)
    yield make(hidden, heads.num_heads * heads.head_dim, False, bias=heads.out_bias, residual=True)
    if layer.cross is not None:
        yield make(layer.cross.num_heads * layer.cross.head_dim, hidden, False, norm=norm, bias=layer.cross.qkv_bias)
    mlp = layer.mlp
    yield make(mlp.size, hidden, mlp.gated, norm=norm, activation=mlp.activation, bias=mlp.bias)
    yield make(hidden, mlp.size, False, bias=mlp.bias, residual=True)
    if spec.head is not None and scheme is None:
        yield make(spec.vocab_size, spec.embedding.size, False, bias=spec.head.bias)


def candidates_of(found: Product, rows: int) -> Iterator[Candidate]:
    """All ways worth a try; none where a library multiplies fp8 by fp8 anyway."""
    from headrace.kernels.tuning import GEMV_ROWS, KEPT

    if _rounds(found, rows):
        return
    if rows > 1:
        yield _way(found, rows, "torch")
    if rows <= GEMV_ROWS:
        for block_n, (block_k, warps) in product((2, 4, 8), _GEMV_DEPTHS[found.itemsize]):
            values = _loaded(found, block_n, block_k, warps)
            size = values * found.itemsize
            fits = 32 <= size <= _MOST_BYTES if rows == 1 else values >= _FEWEST_VALUES and size <= _MOST_BYTES // 2
            if fits and block_k < 2 * found.k:
                yield _way(found, rows, "gemv", block_n, block_k, warps)
    if rows == 1 and found.norm is not None and found.k <= KEPT:
        yield from _keep_ways(found)
    if rows > 2:
        yield from _skinny_ways(found, rows)


def _rounds(found: Product, rows: int) -> bool:
    import torch

    from headrace.kernels.ops.linear import rounds
    from headrace.kernels.quantize import find_scheme

    if (scheme := find_scheme(found.scheme)) is None:
        return False
    weight = torch.empty(found.n * (2 if found.gated else 1), found.k, dtype=scheme.dtype, device="meta")
    return rounds(torch.empty(rows, found.k, device="meta"), weight)


def _loaded(found: Product, block_n: int, block_k: int, warps: int) -> int:
    """Weights that a thread loads at once."""
    return block_n * block_k // (32 * warps) * (2 if found.gated else 1)


def _keep_ways(found: Product) -> Iterator[Candidate]:
    block_k = 1 << (found.k - 1).bit_length()
    heights = (1, 2, 4) if found.itemsize == 2 else (1, 2, 4, 8)
    for block_n, warps, programs in product(heights, (2, 4, 8), (2, 3, 4, 6)):
        values = _loaded(found, block_n, block_k, warps)
        if values >= _FEWEST_VALUES and values * found.itemsize <= _MOST_BYTES:
            yield _way(found, 1, "keep", block_n, block_k, warps, programs=programs * _processors())


def _skinny_ways(found: Product, rows: int) -> Iterator[Candidate]:
    from headrace.kernels.tuning import whole_splits

    for block_m, block_n, block_k, warps, stages in dict.fromkeys(_skinny_tiles(found, rows)):
        tiles = -(-found.n // block_n) * (-(-rows // block_m) if block_m else 1)
        fill = (1, 2) if rows <= 64 else (0.5, 1, 2)  # adding up parts costs with rows
        wanted = {max(1, min(8, int(each * _processors() / tiles))) for each in fill}
        for splits in sorted({whole_splits(found.k, block_k, count) for count in wanted}):
            shape = (block_n, block_k, warps, stages, splits)
            # Beside so many sums there is no room for a first tile.
            fetched = ((True, False),) if found.itemsize == 2 or rows <= 64 else ()
            for early, ahead in ((False, False), *fetched, (False, True)):
                yield _way(found, rows, "skinny", *shape, early=early, ahead=ahead, block_m=block_m)


def _skinny_tiles(found: Product, rows: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows of x, 0 for all, and of the weight, depth, warps and stages."""
    limit = next(limit for limit in _SKINNY if rows <= limit)
    for tile in (_SKINNY_GATED if found.gated else _SKINNY)[limit]:
        yield 0, *tile
    if rows >= _FEWEST_CUT_ROWS and found.n * found.k * (2 if found.gated else 1) <= _SMALL:
        yield from (tile for tile in (_ROW_TILES_GATED if found.gated else _ROW_TILES) if tile[0] <= rows)
    elif rows > 128:
        yield from _LARGE_TILES_GATED if found.gated else _LARGE_TILES
    if found.itemsize == 1:
        yield from _narrow_tiles(found, rows)


def _narrow_tiles(found: Product, rows: int) -> Iterator[tuple[int, int, int, int, int]]:
    """What is tried besides of a weight in 8 bits, as far as a GPU can hold it."""
    if rows <= 64:
        deep = _DEEP_TILES_GATED if found.gated else _DEEP_TILES
        yield from ((0, *tile) for tile in deep[16 if rows <= 16 else 64])
        return
    for block_m, block_n, block_k, warps, stages in _NARROW_TILES:
        height = block_n * (2 if found.gated else 1)
        held = (stages * 2 * block_m + (stages - 1) * height) * block_k  # as Triton has them in flight
        if block_m <= rows and block_m * height <= 32 * warps * _MOST_SUMS and held <= _SHARED_MEMORY:
            yield block_m if block_m < rows else 0, block_n, block_k, warps, stages


def _way(found: Product, rows: int, *tiles: Any, **more: Any) -> Candidate:
    from headrace.kernels.tuning import Tiles

    return Candidate(found, rows, Tiles(*tiles, **more))


def _processors() -> int:
    import torch

    return torch.cuda.get_device_properties().multi_processor_count
