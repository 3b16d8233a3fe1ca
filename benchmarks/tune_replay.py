"""A call as a CUDA graph, timed."""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["Replay"]


class Replay:
    """A call as a CUDA graph.

    Args:
        call: launches what is to be timed, on the current stream.
    """

    def __init__(self, call: Any) -> None:
        import torch

        self._call = call  # with what the graph reads
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            call()

    def us(self) -> float:
        """Microseconds that it takes, the first time not counted."""
        import torch

        times: list[float] = []
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(6):
            start.record()
            self._graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return float(statistics.median(times[1:]))
