"""Finds the tiles of products of a few rows on this GPU, for the shapes of well-known models, and stores them.

    python -m headrace.benchmarks.tune                             all; writes kernels/tuned/<name of the GPU>.json
    python -m headrace.benchmarks.tune --model llama-8b --rows 1   some of it; what else the table holds stays
    python -m headrace.benchmarks.tune --quantize int8             of weights in 8 bits, with factors

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
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click

from headrace.benchmarks.shapes import SHAPES
from headrace.benchmarks.tune_layers import has_layers, settled
from headrace.benchmarks.tune_replay import Replay
from headrace.benchmarks.tune_ways import Candidate, Product, candidates_of, products_of
from headrace.workers.config import QUANTIZATIONS

__all__ = ["MODELS", "Bench", "compile_all", "main", "write_table"]

MODELS = [name for name in SHAPES if not name.startswith("tiny")]

_WEIGHT_BYTES = 2.2e9  # of which weights are cut; a head may take most of it
_FEWEST_COPIES, _COPIED_BYTES = 24, 2e8  # of a weight: so many that no cache holds them all
_FINALISTS = 6  # that are timed again, for clocks and neighbours change from one to the next
_NEAR = 1.06  # times the best: so much longer alone may a product take that layers are asked about
_ROUNDS = 5


@click.command(context_settings={"show_default": True})
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Repeatable; default all.")
@click.option("--rows", "rows", multiple=True, type=int, default=(1, 2, 4, 16, 32, 64, 128, 256), help="Repeatable.")
@click.option(
    "--quantize", "scheme", type=click.Choice(QUANTIZATIONS), help="Weights that are; fp8 may do with int8's."
)
@click.option("--workers", default=os.cpu_count() or 1, help="Processes that compile.")
@click.option("--table", "path", type=click.Path(path_type=Path), help="File.  [default: that of this GPU]")
def main(models: tuple[str, ...], rows: tuple[int, ...], scheme: str | None, workers: int, path: Path | None) -> None:
    """Measure tiles and store the best."""
    import torch

    from headrace.kernels.tuning import table_name

    if not torch.cuda.is_available():
        raise click.UsageError("Tiles are measured on a CUDA GPU, and there is none here.")
    gpu = torch.cuda.get_device_name()
    path = path or Path(__file__).parents[1] / "kernels/tuned" / table_name(gpu)
    products = list(dict.fromkeys(found for name in models or MODELS for found in products_of(name, scheme)))
    candidates = [way for found in products for count in rows for way in candidates_of(found, count)]
    started = time.perf_counter()
    compile_all(candidates, workers)
    click.echo(f"{gpu}: {len(candidates)} candidates compiled in {time.perf_counter() - started:.0f} s")
    bench = Bench(scheme)
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
        for shape, row, saved in settled(name, count, of_count, scheme):
            click.echo(f"{_line(row)}: saves {saved:.1%} of layers of {name}")
            write_table(path, gpu, [row])
            del undecided[shape]  # what several models have is as the first of them wants it
    click.echo(f"{path}: done in {time.perf_counter() - started:.0f} s")


def _grouped(candidates: list[Candidate]) -> Collection[list[Candidate]]:
    groups: dict[tuple[Product, int], list[Candidate]] = {}
    for way in candidates:
        groups.setdefault((way.product, way.rows), []).append(way)
    return groups.values()


class Bench:
    """Times products over weights that no cache holds; what the values mean makes no difference.

    Args:
        scheme: of the weights, if they are quantized.
    """

    def __init__(self, scheme: str | None) -> None:
        import torch

        from headrace.kernels.quantize import find_scheme

        self._scheme = find_scheme(scheme)
        if self._scheme is None:
            self._values = torch.randn(int(_WEIGHT_BYTES / 2), device="cuda", dtype=torch.bfloat16).mul_(0.02)
        else:
            numbers = torch.randint(-127, 128, (int(_WEIGHT_BYTES),), device="cuda", dtype=torch.int8)
            self._values = numbers.to(self._scheme.dtype)

    def weights(self, found: Product) -> list[Any]:
        """Some weights of that product."""
        import torch

        height = found.n * (2 if found.gated else 1)
        size = height * found.k
        enough = int(_COPIED_BYTES / self._values.element_size()) // size
        copies = min(max(_FEWEST_COPIES, enough), len(self._values) // size)
        values = self._values if self._scheme else self._values.view(getattr(torch, found.dtype))
        return [values[index * size :][:size].view(height, found.k) for index in range(copies)]

    def call(self, way: Candidate, weights: list[Any]) -> Any:
        """A function that computes the product with each weight."""
        import torch

        from headrace.kernels.ops import linear_triton
        from headrace.kernels.ops.norm import NormWeights

        found = way.product
        height, own = found.n * (2 if found.gated else 1), getattr(torch, found.dtype)

        def random_(*shape: int, dtype: torch.dtype = own) -> torch.Tensor:
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
        if self._scheme:
            around["scale"] = random_(height, dtype=self._scheme.factors or own).mul_(1e-4)
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
    _bench = _bench or Bench(way.product.scheme)
    with suppress(OutOfResources):  # as will be seen when it is timed
        _bench.call(way, _bench.weights(way.product)[:1])()


def write_table(path: Path, gpu: str, rows: list[dict[str, Any]]) -> None:
    """Write rows of a table, each with the day; others that it has stay."""
    import torch
    import triton

    from headrace.kernels.tuning import LinearShape

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name, False) for name in LinearShape.__slots__)  # older rows lack fp8

    known = json.loads(path.read_text())["linear"] if path.exists() else []
    day = time.strftime("%Y-%m-%d")
    merged = {place(row): row for row in [*known, *({**row, "date": day} for row in rows)]}
    about = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "date": day}
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
