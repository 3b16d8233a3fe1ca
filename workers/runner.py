"""Launches one plan on the model: builds the batch, computes the logits, chooses the tokens.

It owns what has a device: the model, the KV tensors, the tables of rows. It decides nothing about who runs. On a GPU a
step is only on its way when `launch` returns, and the next may be launched behind it: it takes tokens that are not
known here yet from the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace.kernels.kv import KVCache
from headrace.workers.batch import BatchBuilder
from headrace.workers.device import upload
from headrace.workers.graphs import (
    DeviceTables,
    RehearsedGraphs,
    Standing,
    StaticDecodes,
    StaticPrompts,
    StaticStep,
    StepGraphs,
)
from headrace.workers.parallel_compile import compile_ahead
from headrace.workers.rehearsal import rehearsing
from headrace.workers.sampler import Choices, Sampler
from headrace.workers.scheduler import Plan

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["Runner"]

logger = logging.getLogger(__name__)


class Runner:
    """The model, its KV cache of `num_blocks` blocks, and `launch`."""

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
    ) -> None:
        parameter = next(model.parameters())
        device = parameter.device
        model.reserve_positions(max_model_len)
        self.model = model
        self.kv = KVCache(model.spec, num_blocks, block_size, parameter.dtype, device)
        self._sampler = Sampler(num_rows=max_num_seqs, vocab=model.spec.vocab_size, device=device)
        self._builder = BatchBuilder(
            num_rows=max_num_seqs,
            max_blocks=-(-max_model_len // block_size),
            block_size=block_size,
            last_tokens=self._sampler.last_tokens,
        )
        self._num_rows = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._graphs: StepGraphs | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether steps run beside the host, and can become graphs."""
        return self.kv.layer(0)[0].is_cuda

    @property
    def num_replays(self) -> int:
        """Steps computed by a graph."""
        return 0 if self._graphs is None else self._graphs.replays

    def forget_replays(self) -> None:
        """Count them from here on."""
        if self._graphs is not None:
            self._graphs.replays = 0

    @property
    def num_graphs(self) -> int:
        """Sizes of batches that have a graph."""
        return 0 if self._graphs is None else len(self._graphs)

    def capture(self) -> None:
        """Make graphs of steps of all sizes; call it when nothing runs. Without room for them there are none."""
        try:
            graphs = StepGraphs(self.static_steps())
            graphs.capture()
            self._graphs = graphs
        except torch.OutOfMemoryError as error:
            logger.warning(
                "There is no memory for CUDA graphs (%s); steps are computed without them, which is slower. Lower "
                "--kv-tokens or --max-num-seqs.",
                str(error).partition("\n")[0],
            )

    def compile_ahead(self, compute: Callable[[], None]) -> int:
        """Compile with many threads what a function launches by this runner, before it is called for its results; the
        number of kernels."""
        device = self._sampler.last_tokens.device
        graphs = self._graphs
        try:
            with rehearsing(self.model):
                return compile_ahead(compute, device)
        finally:
            self._graphs = graphs

    def rehearse_capture(self) -> None:
        """Do as `capture`, in a rehearsal."""
        with suppress(torch.OutOfMemoryError):
            graphs = RehearsedGraphs(self.static_steps())
            graphs.capture()
            self._graphs = graphs

    def static_steps(self) -> list[StaticStep]:
        """The kinds of steps that can become graphs."""
        standing = Standing(
            model=self.model,
            kv=self.kv,
            tables=self._device_tables(),
            sampler=self._sampler,
            num_rows=self._num_rows,
            max_model_len=self._max_model_len,
        )
        if self.model.spec.encoder is not None:
            return [StaticDecodes(standing, sources=self._device_tables())]
        return [StaticDecodes(standing), StaticPrompts(standing, self._max_batch_tokens)]

    def _device_tables(self) -> DeviceTables:
        max_blocks = -(-self._max_model_len // self.kv.block_size)
        return DeviceTables(self._num_rows, max_blocks, self.kv.scratch_block, self._sampler.last_tokens.device)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Choices:
        """Start a step; it chooses a token for each chunk that reaches the end of what its sequence knows."""
        if plan.encodes:
            self.model.encode(self._builder.build_sources(plan.encodes), self.kv)
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        computed = None if self._graphs is None else self._graphs.run(plan)
        if computed is None:
            return self._sampler.choose(self.model(self._builder.build(plan.chunks), self.kv), sampling)
        logits, tokens = (rows[: len(plan.chunks)] for rows in computed)
        if len(sampling) < len(plan.chunks):
            those = np.flatnonzero([chunk.samples for chunk in plan.chunks])
            logits, tokens = (rows.index_select(0, upload(those, rows.device)) for rows in (logits, tokens))
        return self._sampler.choose(logits, sampling, tokens)
