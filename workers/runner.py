"""Runs one plan on the model: builds the batch, computes the logits, chooses the tokens.

It owns what has a device: the model, the KV tensors, the tables of rows. It decides nothing about who runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headrace.kernels.kv import KVCache
from headrace.workers.batch import BatchBuilder
from headrace.workers.sampler import Choice, Sampler
from headrace.workers.scheduler import Plan

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["Runner"]


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

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Choice]:
        """Compute a step; one choice for each chunk that reaches the end of what its sequence knows."""
        if plan.encodes:
            self.model.encode(self._builder.build_sources(plan.encodes), self.kv)
        batch = self._builder.build(plan.chunks)
        logits = self.model(batch, self.kv)
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        return self._sampler.choose(logits, sampling) if sampling else []
