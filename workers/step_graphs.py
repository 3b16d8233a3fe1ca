"""Graphs of steps: one launch instead of hundreds, for every size of every kind (`headrace.workers.graphs`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headrace.workers.device import captured
from headrace.workers.graphs import Computed, StaticStep
from headrace.workers.scheduler import Plan

__all__ = ["RehearsedGraphs", "StepGraphs"]


class StepGraphs:
    """Graphs of steps: of all sizes of all kinds, or of those that were asked for.

    Args:
        kinds: of steps; the first that takes a step, and has a graph of its size, computes it.
        prepared: what surrounds the call that compiles what a graph needs, before it is captured.

    Attributes:
        pool: of their memory, once they are captured; graphs that never run at the same time may share it.
        replays: steps computed by a graph.
    """

    def __init__(
        self, kinds: Items[StaticStep], prepared: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.pool: Any = None
        self.replays = 0
        self._kinds = kinds
        self._prepared = prepared
        self._graphs: dict[tuple[StaticStep, int], tuple[torch.cuda.CUDAGraph, Computed]] = {}
        self._read: set[Tensor] = set()
        self._once: set[tuple[StaticStep, int]] | None = None  # those that were replayed, where that is enough

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self) -> None:
        """Capture all of them, the largest first: the others find room in its memory."""
        for kind in reversed(self._kinds):
            for size in reversed(kind.sizes):
                self._capture(kind, size)

    def capture_for(self, count: int) -> None:
        """Capture what steps of the first kind need that are as large as `count`, unless it is there."""
        kind = self._kinds[0]
        if (size := kind.size_of(count)) is not None and not self._has(kind, size):
            self._capture(kind, size)

    def run(self, plan: Plan) -> Computed | None:
        """What comes of a step; None if no graph computes such a one."""
        for kind in self._kinds:
            if (size := kind.size_for(plan.chunks)) is not None and self._has(kind, size):
                kind.fill(plan.chunks, size)
                self.replays += 1
                return self._replay(kind, size)
        return None

    @contextmanager
    def once(self) -> Iterator[None]:
        """Within, each graph is replayed once; of what it would compute after that come zeros."""
        self._once = set()
        try:
            yield
        finally:
            self._once = None

    def _has(self, kind: StaticStep, size: int) -> bool:
        return (kind, size) in self._graphs

    @torch.inference_mode()
    def _capture(self, kind: StaticStep, size: int) -> None:
        kind.fill((), size)
        # Should the model ever have larger tables, this graph goes on reading these.
        self._read.update(kind.rotary_tables)
        graph, _ = self._graphs[kind, size] = captured(partial(kind.compute, size), self.pool, self._prepared)
        self.pool = graph.pool()

    def _replay(self, kind: StaticStep, size: int) -> Computed:
        graph, computed = self._graphs[kind, size]
        if self._once is not None and (kind, size) in self._once:
            # Graphs share their memory, so what another left there may be no tokens.
            computed.logits.zero_()
            computed.tokens.zero_()
        else:
            graph.replay()
        if self._once is not None:
            self._once.add((kind, size))
        return computed


class RehearsedGraphs(StepGraphs):
    """As graphs, in a rehearsal: nothing is captured, so that a replay computes."""

    @torch.inference_mode()
    def capture(self) -> None:
        """Compute all of them once."""
        for kind in self._kinds:
            for size in kind.sizes:
                kind.fill((), size)
                kind.compute(size)

    def _has(self, kind: StaticStep, size: int) -> bool:
        return True

    def _replay(self, kind: StaticStep, size: int) -> Computed:
        return kind.compute(size)
