"""Runs one plan on the model: builds the batch, computes the logits, chooses the tokens.

It owns what has a device: the model, the KV tensors, the tables of rows. It decides nothing about who runs.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from headrace.kernels.kv import KVCache
from headrace.workers.batch import BatchBuilder
from headrace.workers.graphs import DecodeGraphs, StaticDecode
from headrace.workers.sampler import Choice, Sampler
from headrace.workers.scheduler import Plan

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["Runner"]

logger = logging.getLogger(__name__)


class Runner:
    """The model, its KV cache of `num_blocks` blocks, and `run`."""

    def __init__(
        self, model: Model, *, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        parameter = next(model.parameters())
        device = parameter.device
        model.reserve_positions(max_model_len)
        self.model = model
        self.kv = KVCache(model.spec, num_blocks, block_size, parameter.dtype, device)
        self._builder = BatchBuilder(
            num_rows=max_num_seqs,
            max_blocks=-(-max_model_len // block_size),
            block_size=block_size,
            device=device,
        )
        self._sampler = Sampler(num_rows=max_num_seqs, device=device)
        self._num_rows = max_num_seqs
        self._max_model_len = max_model_len
        self._graphs: DecodeGraphs | None = None

    @property
    def can_capture(self) -> bool:
        """Whether steps can become graphs: only on a GPU."""
        return self.kv.layer(0)[0].is_cuda

    @property
    def num_replays(self) -> int:
        """Steps computed by a graph."""
        return 0 if self._graphs is None else self._graphs.replays

    @property
    def num_graphs(self) -> int:
        """Sizes of batches that have a graph."""
        return 0 if self._graphs is None else len(self._graphs.sizes)

    def capture(self) -> None:
        """Make graphs of decode steps of all sizes; call it when nothing runs. Without room for them there are none."""
        try:
            self._graphs = self._captured()
        except torch.OutOfMemoryError as error:
            logger.warning(
                "There is no memory for CUDA graphs (%s); steps are computed without them, which is slower. Lower "
                "--kv-tokens or --max-num-seqs.",
                str(error).partition("\n")[0],
            )

    def _captured(self) -> DecodeGraphs:
        step = StaticDecode(
            self.model,
            self.kv,
            num_rows=self._num_rows,
            max_blocks=-(-self._max_model_len // self.kv.block_size),
            max_model_len=self._max_model_len,
        )
        graphs = DecodeGraphs(step, self._num_rows)
        graphs.capture()
        return graphs

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Choice]:
        """Compute a step; one choice for each chunk that reaches the end of what its sequence knows."""
        if plan.encodes:
            self.model.encode(self._builder.build_sources(plan.encodes), self.kv)
        if self._graphs is not None and self._graphs.takes(plan):
            logits = self._graphs.run(plan.chunks)
        else:
            logits = self.model(self._builder.build(plan.chunks), self.kv)
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        return self._sampler.choose(logits, sampling) if sampling else []
