"""CUDA graphs where there is no GPU: what a graph computes is computed again each time, on the same tensors.

Kernels read how long contexts are on the device; what stands in for them here, the references, are told by the host.
That is the only thing in a step that is not at a fixed address, so it is looked up anew.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.kv import KVCache
from headrace.kernels.ops.pair import kernels_on_cpu
from headrace.workers.encoder_graphs import StaticTexts
from headrace.workers.graphs import StaticStep
from headrace.workers.inference import road, sources

__all__ = ["Pretended"]


class Pretended:
    """Lets the library find that a CPU has graphs.

    Args:
        monkeypatch: puts things back.
        interpreted: steps are of kernels, which take seconds each.

    Attributes:
        sizes: of the graphs that were captured, in order; those of whole texts are pairs.
        alive: the graphs that nobody dropped yet.
        error: what a capture raises, if anything.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, interpreted: bool = False) -> None:
        self.sizes: list[Any] = []
        self.alive: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self.error: Exception | None = None
        self._compute = _interpreted if interpreted else _told
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
        for module in ("step_graphs", "encoder_graphs"):
            monkeypatch.setattr(f"headrace.workers.{module}.captured", self._captured)
        monkeypatch.setattr(road, "has_graphs", _has_graphs)
        monkeypatch.setattr(sources, "has_graphs", _has_graphs)

    def _captured(self, compute: Any, pool: object = None, prepared: object = None) -> tuple[_Graph, Any]:
        step, (size,) = compute.func.__self__, compute.args
        if self.error is not None:
            raise self.error
        graph = _Graph(lambda: self._compute(step, size))
        self.sizes.append(size)
        self.alive.add(graph)
        return graph, graph.results


class _Graph:
    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute
        self.results = compute()

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        for place, value in zip(self.results, self._compute(), strict=True):
            place.copy_(value)


def _has_graphs(device: torch.device) -> bool:
    return True


def _interpreted(step: Any, size: Any) -> Any:
    with kernels_on_cpu():
        return step.compute(size)


def _told(step: Any, size: Any) -> Any:
    with _texts_known(step) if isinstance(step, StaticTexts) else _lens_known(step):
        return step.compute(size)


@contextmanager
def _texts_known(step: StaticTexts) -> Iterator[None]:
    """Let the model know how long texts really are, and of those alone that are there."""
    results = step._results

    def known(batch: Batch) -> tuple[Tensor, ...]:
        texts = batch.context_lens.nonzero().flatten()
        starts = torch.cat((batch.query_starts[texts], batch.query_starts[-1:]))
        lens = tuple(batch.context_lens[texts].tolist())
        batch = dataclasses.replace(
            batch,
            query_starts=starts,
            context_lens=batch.context_lens[texts],
            block_tables=batch.block_tables[texts],
            query_lens=lens,
            context_lens_host=lens,
            _shared={},
        )
        return results(batch)

    step._results = known
    try:
        yield
    finally:
        step._results = results


@contextmanager
def _lens_known(step: StaticStep) -> Iterator[None]:
    """Let the model know how long contexts really are."""
    standing: Any = step._standing

    def forward(batch: Batch, kv: KVCache) -> Tensor:
        cross = None if batch.cross is None else _with_lens(batch.cross)
        logits: Tensor = standing.model(dataclasses.replace(_with_lens(batch), cross=cross), kv)
        return logits

    step._standing = dataclasses.replace(standing, model=forward)
    try:
        yield
    finally:
        step._standing = standing


def _with_lens(batch: Batch) -> Batch:
    return dataclasses.replace(batch, context_lens_host=tuple(batch.context_lens.tolist()), _shared={})
