"""The second half of tuning: of the tiles that were fastest alone, those with which whole layers are.

A product runs between others, whose beginnings and ends it shares the GPU with, so the fastest alone need not be the
fastest there. Some layers of the model decode, or those of an encoder read a text; product by product the finalists are
tried, the others being as they were chosen by then.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from headrace.benchmarks.models import spec_of
from headrace.benchmarks.shapes import find_source
from headrace.benchmarks.tune_replay import Replay

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["Finalists", "has_layers", "settled"]

Finalists = Mapping[Any, list[dict[str, Any]]]  # by product, rows of the table, the fastest alone first

_LAYERS = 4  # together more weights than a cache holds
_CONTEXT = 512
_BLOCK = 16
_FACTOR = 0.02 / 74  # of numbers in 8 bits, which deviate by 74: weights as large as those in 16 bits
_ROUNDS = 7


def has_layers(name: str) -> bool:
    """Whether layers of a model can be computed without anything else."""
    return spec_of(find_source(name)).encoder is None


def settled(
    name: str, count: int, finalists: Finalists, scheme: str | None = None
) -> Iterator[tuple[Any, dict[str, Any], float]]:
    """Each product of a model's layers, its row of the table, and what share of the layers' time it saves to have that
    instead of the fastest alone.

    Args:
        name: of the shape.
        count: sequences that decode, of an encoder the tokens of a text.
        finalists: of these products.
        scheme: of the weights, if they are quantized.
    """
    step = _step(name, count, scheme)
    chosen = {product: rows[0] for product, rows in finalists.items()}
    for product in _products_of(step, finalists):
        replays = []
        for row in finalists[product]:
            with _table(chosen | {product: row}):
                replays.append(Replay(step))
        rounds = [[replay.us() for replay in replays] for _ in range(_ROUNDS)]
        times = [statistics.median(times) for times in zip(*rounds, strict=True)]
        best = times.index(min(times))
        chosen[product] = finalists[product][best]
        yield product, chosen[product], 1 - times[best] / times[0]


def _step(name: str, count: int, scheme: str | None) -> Callable[[], Any]:
    """Some layers of a model, with random weights, for so many tokens."""
    import torch

    from headrace.kernels.model import Model
    from headrace.kernels.quantize import find_scheme

    source = find_source(name, layers=_LAYERS)
    spec, dtype = spec_of(source), getattr(torch, source.dtype)
    model = Model(spec, dtype=dtype, device="cuda", scheme=find_scheme(scheme))
    _fill(model)
    model.pack()
    model.fold()
    model.reserve_positions(_CONTEXT)
    return _text_step(model, count) if spec.is_encoder else _decode_step(model, count)


def _fill(model: Model) -> None:
    """With random weights, of one size however they are stored."""
    import torch

    from headrace.kernels.quantize import NARROW

    for weight in model.parameters():
        if weight.dtype in NARROW:  # fp8 has no random numbers of its own
            weight.data.copy_(torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=weight.device))
        else:
            weight.data.normal_(0, 0.02)
    for scale in model.scales().values():
        scale.fill_(_FACTOR)


def _text_step(model: Model, count: int) -> Callable[[], Any]:
    """A text of so many tokens."""
    import torch

    from headrace.workers.batch import whole_texts

    batch = whole_texts(torch.arange(count, device="cuda"), [count])
    return lambda: model.hidden(batch, None)


def _decode_step(model: Model, count: int) -> Callable[[], Any]:
    """So many sequences that all have the same length."""
    import torch

    from headrace.kernels.batch import Batch
    from headrace.kernels.kv import KVCache

    blocks = count * _CONTEXT // _BLOCK
    cache = KVCache(model.spec, blocks, _BLOCK, model.embedding.weight.dtype, "cuda")
    tables = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(count, -1)
    positions = torch.full((count,), _CONTEXT - 1, device="cuda")
    lens = torch.full((count,), _CONTEXT, device="cuda", dtype=torch.int32)

    def step() -> Any:
        batch = Batch(
            token_ids=torch.arange(count, device="cuda"),
            positions=positions,
            slots=tables[:, -1].long() * _BLOCK + _BLOCK - 1,
            query_starts=torch.arange(count + 1, device="cuda", dtype=torch.int32),
            context_lens=lens,
            block_tables=tables,
            num_decodes=count,
            query_lens=(1,) * count,
            context_lens_host=(_CONTEXT,) * count,
            logits_rows=None,
            block_size=_BLOCK,
        )
        return model.hidden(batch, cache)

    return step


def _products_of(step: Callable[[], Any], finalists: Finalists) -> list[Any]:
    """Those that a step asks for, in their order."""
    with _table({}) as asked:
        step()
    return [product for product in asked if product in finalists]


@contextmanager
def _table(rows: Mapping[Any, dict[str, Any]]) -> Iterator[list[Any]]:
    """Let tiles be those of some rows instead of the stored ones; gives the products that were asked for."""
    from headrace.kernels import tuning

    tiles = tuning.parse_table({"linear": list(rows.values())})
    stored, asked = tuning.read_table, []

    class Table(dict[Any, Any]):
        def get(self, product: Any, default: Any = None) -> Any:
            asked.append(product)
            return super().get(product, default)

    tuning.tiles_for.cache_clear()
    try:
        with patch.object(tuning, "read_table", lambda name: Table({**stored(name), **tiles})):
            yield asked
    finally:
        tuning.tiles_for.cache_clear()
