"""Steps as graphs compute them, but without graphs: on the same tensors, by kernels that Triton interprets."""

from __future__ import annotations

from headrace.kernels.ops.pair import kernels_on_cpu
from headrace.workers.encoder_graphs import RehearsedTexts
from headrace.workers.step_graphs import RehearsedGraphs

__all__ = ["InterpretedSteps", "InterpretedTexts"]


class InterpretedSteps(RehearsedGraphs):
    """Of a decoder."""

    def _replay(self, kind, size):
        with kernels_on_cpu():
            return super()._replay(kind, size)


class InterpretedTexts(RehearsedTexts):
    """Of an encoder."""

    def _computed(self, size):
        with kernels_on_cpu():
            return super()._computed(size)
