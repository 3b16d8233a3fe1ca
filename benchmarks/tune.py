"""Finds the tiles of products of a few rows on this GPU, for the shapes of well-known models, and stores them.

    python -m headrace.benchmarks.tune                             all; writes kernels/tuned/<name of the GPU>.json
    python -m headrace.benchmarks.tune --model llama-8b --rows 1   some of it; what else the table holds stays

Each candidate is timed as decode steps run it: launch after launch in a CUDA graph, with what comes before and after
the product, and with another weight every time, so that it comes from memory and not from the L2 cache. GB/s are those
of the weight alone. Of those that are nearly as fast as the best, whole layers of the models choose (`tune_layers`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click

from headrace.benchmarks.shapes import SHAPES, find_source
from headrace.benchmarks.tune_layers import has_layers, settled
from headrace.benchmarks.tune_replay import Replay

MODELS = [name for name in SHAPES if not name.startswith("tiny")]
_WITH_HEADS = {"BertModel": "BertForMaskedLM"}

# Depths and warps of a program whose threads each load 16 bytes of a row at once, or 32.
_GEMV_DEPTHS = [(256, 1), (512, 2), (1024, 4), (2048, 8), (512, 1), (2048, 4)]
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
_WEIGHT_BYTES = 2.2e9  # of which weights are cut; a head may take most of it
_FEWEST_COPIES, _COPIED_BYTES = 24, 2e8  # of a weight: so many that no cache holds them all
_FINALISTS = 6  # that are timed again, for clocks and neighbours change from one to the next
_NEAR = 1.06  # times the best: so much longer alone may a product take that layers are asked about
_ROUNDS = 5


@dataclass(frozen=True)
class Product:
    """A product of a model, with what is around it."""

    n: int
    k: int
    gated: bool
    norm: Any = field(compare=False, default=None)
    activation: Any = field(compare=False, default=None)
    bias: bool = field(compare=False, default=False)
    residual: bool = field(compare=False, default=False)
    dtype: str = field(compare=False, default="bfloat16")


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

        return LinearShape(self.rows, self.product.n, self.product.k, self.product.gated, 2)


@click.command(context_settings={"show_default": True})
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Repeatable; default all.")
@click.option("--rows", "rows", multiple=True, type=int, default=(1, 2, 4, 16, 32, 64, 128, 256), help="Repeatable.")
@click.option("--workers", default=os.cpu_count() or 1, help="Processes that compile.")
@click.option("--table", "path", type=click.Path(path_type=Path), help="File.  [default: that of this GPU]")
def main(models: tuple[str, ...], rows: tuple[int, ...], workers: int, path: Path | None) -> None:
    """Measure tiles and store the best."""
    import torch

    from headrace.kernels.tuning import table_name

    if not torch.cuda.is_available():
        raise click.UsageError("Tiles are measured on a CUDA GPU, and there is none here.")
    gpu = torch.cuda.get_device_name()
    path = path or Path(__file__).parents[1] / "kernels/tuned" / table_name(gpu)
    products = list(dict.fromkeys(found for name in models or MODELS for found in products_of(name)))
    candidates = [way for found in products for count in rows for way in candidates_of(found, count)]
    started = time.perf_counter()
    compile_all(candidates, workers)
    click.echo(f"{gpu}: {len(candidates)} candidates compiled in {time.perf_counter() - started:.0f} s")
    bench = Bench()
    undecided = {}
    for ways in _grouped(candidates):
        finalists = bench.finalists(ways)
        click.echo(_line(finalists[0]))
        write_table(path, gpu, finalists[:1])  # each at once: an end by force costs only what was not measured
        undecided[ways[0].shape] = finalists
    click.echo(f"{len(undecided)} products measured alone in {time.perf_counter() - started:.0f} s")
    del bench
    for name, count in product(filter(has_layers, models or MODELS), rows):
        of_count = {shape: finalists for shape, finalists in undecided.items() if shape.rows == count}
        for shape, row, saved in settled(name, count, of_count):
            click.echo(f"{_line(row)}: saves {saved:.1%} of layers of {name}")
            write_table(path, gpu, [row])
            del undecided[shape]  # what several models have is as the first of them wants it
    click.echo(f"{path}: done in {time.perf_counter() - started:.0f} s")


def products_of(name: str) -> Iterator[Product]:
    """The products of a few rows that a decode step of a model computes."""
    from headrace.benchmarks.models import config_of
    from headrace.kernels.policies import find_policy

    config = config_of(find_source(name))
    config.architectures = [_WITH_HEADS.get(config.architectures[0], config.architectures[0])]
    spec = find_policy(config.architectures[0]).spec(config)
    layer, hidden = spec.layers[0], spec.hidden_size
    norm = None if layer.placement == "post" or layer.residual_from_norm else layer.norm
    heads = layer.attention
    make = partial(Product, dtype=find_source(name).dtype)
    yield make(heads.qkv_size, hidden, False, norm=norm, bias=heads.qkv_bias)
    yield make(hidden, heads.num_heads * heads.head_dim, False, bias=heads.out_bias, residual=True)
    if layer.cross is not None:
        yield make(layer.cross.num_heads * layer.cross.head_dim, hidden, False, norm=norm, bias=layer.cross.qkv_bias)
    mlp = layer.mlp
    yield make(mlp.size, hidden, mlp.gated, norm=norm, activation=mlp.activation, bias=mlp.bias)
    yield make(hidden, mlp.size, False, bias=mlp.bias, residual=True)
    if spec.head is not None:
        yield make(spec.vocab_size, spec.embedding.size, False, bias=spec.head.bias)


def candidates_of(found: Product, rows: int) -> Iterator[Candidate]:
    """All ways worth a try."""
    from headrace.kernels.tuning import GEMV_ROWS, KEPT

    if rows > 1:
        yield _way(found, rows, "torch")
    if rows <= GEMV_ROWS:
        for block_n, (block_k, warps) in product((2, 4, 8), _GEMV_DEPTHS):
            values = block_n * block_k // (32 * warps) * (2 if found.gated else 1)  # that a thread loads at once
            if (16 <= values <= 64 if rows == 1 else values == 32) and block_k < 2 * found.k:
                yield _way(found, rows, "gemv", block_n, block_k, warps)
    if rows == 1 and found.norm is not None and found.k <= KEPT:
        yield from _keep_ways(found)
    if rows > 2:
        yield from _skinny_ways(found, rows)


def _keep_ways(found: Product) -> Iterator[Candidate]:
    block_k = 1 << (found.k - 1).bit_length()
    for block_n, warps, programs in product((1, 2, 4), (2, 4, 8), (2, 3, 4, 6)):
        if block_n * block_k // (32 * warps) * (2 if found.gated else 1) in (32, 64):
            yield _way(found, 1, "keep", block_n, block_k, warps, programs=programs * _processors())


def _skinny_ways(found: Product, rows: int) -> Iterator[Candidate]:
    from headrace.kernels.tuning import whole_splits

    for block_m, block_n, block_k, warps, stages in _skinny_tiles(found, rows):
        tiles = -(-found.n // block_n) * (-(-rows // block_m) if block_m else 1)
        fill = (1, 2) if rows <= 64 else (0.5, 1, 2)  # adding up parts costs with rows
        wanted = {max(1, min(8, int(each * _processors() / tiles))) for each in fill}
        for splits in sorted({whole_splits(found.k, block_k, count) for count in wanted}):
            shape = (block_n, block_k, warps, stages, splits)
            for early, ahead in ((False, False), (True, False), (False, True)):
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


def _way(found: Product, rows: int, *tiles: Any, **more: Any) -> Candidate:
    from headrace.kernels.tuning import Tiles

    return Candidate(found, rows, Tiles(*tiles, **more))


def _processors() -> int:
    import torch

    return torch.cuda.get_device_properties().multi_processor_count


def _grouped(candidates: list[Candidate]) -> Collection[list[Candidate]]:
    groups: dict[tuple[Product, int], list[Candidate]] = {}
    for way in candidates:
        groups.setdefault((way.product, way.rows), []).append(way)
    return groups.values()


class Bench:
    """Times products over weights that no cache holds; 16-bit values, whose meaning makes no difference."""

    def __init__(self) -> None:
        import torch

        self._values = torch.randn(int(_WEIGHT_BYTES / 2), device="cuda", dtype=torch.bfloat16).mul_(0.02)

    def weights(self, found: Product) -> list[Any]:
        """Some weights of that product."""
        import torch

        height = found.n * (2 if found.gated else 1)
        size = height * found.k
        copies = min(max(_FEWEST_COPIES, int(_COPIED_BYTES / 2) // size), len(self._values) // size)
        values = self._values.view(getattr(torch, found.dtype))
        return [values[index * size :][:size].view(height, found.k) for index in range(copies)]

    def call(self, way: Candidate, weights: list[Any]) -> Any:
        """A function that computes the product with each weight."""
        import torch

        from headrace.kernels.ops import linear_triton
        from headrace.kernels.ops.norm import NormWeights

        found = way.product
        height = found.n * (2 if found.gated else 1)

        def random_(*shape: int, dtype: torch.dtype = weights[0].dtype) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype)

        before = folded = None
        if found.norm is not None:
            layer = found.norm.kind == "layer"
            before = NormWeights(random_(found.k), random_(found.k) if layer else None, found.norm)
            folded = random_(2, height, dtype=torch.float32) if layer else None
        x, bias = random_(way.rows, found.k), random_(height) if found.bias else None
        residual = random_(way.rows, found.n) if found.residual else None
        around = {"activation": found.activation, "gated": found.gated, "residual": residual}
        around |= {"before": before, "folded": folded}
        return lambda: [linear_triton.run(way.tiles, x, weight, bias, **around) for weight in weights]

    def finalists(self, ways: list[Candidate]) -> list[dict[str, Any]]:
        """Rows of the table: of ways to compute one product that the GPU can hold, those that are nearly as fast as the
        fastest, which is the first."""
        from triton.runtime.errors import OutOfResources

        found = ways[0].product
        weights = self.weights(found)
        runs: list[tuple[float, int, Replay]] = []
        for index, way in enumerate(ways):
            with suppress(OutOfResources):
                replay = Replay(self.call(way, weights))
                runs = sorted([*runs, (replay.us(), index, replay)])[:_FINALISTS]
        rounds = [[replay.us() for _, _, replay in runs] for _ in range(_ROUNDS)]
        medians = map(statistics.median, zip(*rounds, strict=True))
        times = sorted(zip((each / len(weights) for each in medians), (run[1] for run in runs), strict=True))
        return [
            asdict(ways[0].shape)
            | asdict(ways[index].tiles)
            | {"us": round(us, 2), "gb_s": round(weights[0].nbytes / us / 1e3)}
            for us, index in times
            if us <= _NEAR * times[0][0]
        ]


def compile_all(candidates: list[Candidate], workers: int) -> None:
    """Launch every candidate once, in several processes: what they compile stays in Triton's cache."""
    shuffled = random.Random(0).sample(candidates, len(candidates))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_launched, shuffled, chunksize=4):
            pass


_bench: Bench | None = None  # of this process


def _launched(way: Candidate) -> None:
    from triton.runtime.errors import OutOfResources

    global _bench
    _bench = _bench or Bench()
    with suppress(OutOfResources):  # as will be seen when it is timed
        _bench.call(way, _bench.weights(way.product)[:1])()


def write_table(path: Path, gpu: str, rows: list[dict[str, Any]]) -> None:
    """Write rows of a table; others that it has stay."""
    import torch
    import triton

    from headrace.kernels.tuning import LinearShape

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in LinearShape.__slots__)

    known = json.loads(path.read_text())["linear"] if path.exists() else []
    merged = {place(row): row for row in [*known, *rows]}
    about = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%Y-%m-%d")}
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    head = json.dumps(about, indent=1).removesuffix("\n}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{head},\n "linear": [\n{lines}\n]}}\n')


def _line(row: dict[str, Any]) -> str:
    size = f"{row['rows']:>3} x {row['n']:>6}{' gated' if row['gated'] else '':<6} x {row['k']:>5}"
    tiles = f"{row['block_n']} x {row['block_k']}, {row['warps']} warps, {row['stages']} stages, {row['splits']} parts"
    tiles += f", {row['block_m']} rows" if row["block_m"] else ""
    tiles += "".join(f", {name}" for name in ("early", "ahead") if row[name])
    return f"{size}  {row['us']:>8.2f} us {row['gb_s']:>5} GB/s  {row['kernel']:<6} {tiles}"


if __name__ == "__main__":
    main()
