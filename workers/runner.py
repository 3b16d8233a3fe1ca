"""Launches one plan on the model: builds the batch, computes the logits, chooses the tokens.

It owns what has a device: the model, the KV tensors, the tables of rows. It decides nothing about who runs. On a GPU a
step is only on its way when `launch` returns, and the next may be launched behind it: it takes tokens that are not
known here yet from the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.kv import KVCache
from headrace.workers.batch import BatchBuilder
from headrace.workers.device import upload
from headrace.workers.encoder_graphs import RehearsedTexts, StaticTexts, TextGraphs, sizes_of_batches
from headrace.workers.graphs import DeviceTables, Standing, StaticDecodes, StaticPrompts, StaticStep
from headrace.workers.parallel_compile import compile_ahead
from headrace.workers.rehearsal import few_layers, rehearsing
from headrace.workers.sampler import Choices, Sampler
from headrace.workers.scheduler import Chunk, Plan
from headrace.workers.sequence import Sequence
from headrace.workers.step_graphs import RehearsedGraphs, StepGraphs

if TYPE_CHECKING:
    from headrace.kernels.batch import Batch
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
        self._source_graphs: TextGraphs | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether steps run beside the host, and can become graphs."""
        return self.kv.layer(0)[0].is_cuda

    @property
    def num_replays(self) -> int:
        """Steps computed, and batches of sources read, by a graph."""
        return sum(graphs.replays for graphs in self._all_graphs)

    def forget_replays(self) -> None:
        """Count them from here on."""
        for graphs in self._all_graphs:
            graphs.replays = 0

    @property
    def num_graphs(self) -> int:
        """Sizes of batches that have a graph."""
        return sum(map(len, self._all_graphs))

    @property
    def _all_graphs(self) -> list[StepGraphs | TextGraphs]:
        return [graphs for graphs in (self._graphs, self._source_graphs) if graphs is not None]

    def capture(self) -> None:
        """Make graphs of steps of all sizes, then of sources, if there are any; call it when nothing runs.

        Those of a kind for which there is no room are left out.
        """
        with _room_for("steps"):
            graphs = StepGraphs(self.static_steps(), partial(few_layers, self.model))
            graphs.capture()
            self._graphs = graphs
        if self.model.spec.encoder is not None:
            with _room_for("sources"):
                sources = TextGraphs(self.static_sources(), self._source_sizes)
                sources.capture(None if self._graphs is None else self._graphs.pool)
                self._source_graphs = sources

    def compile_ahead(self, compute: Callable[[], None]) -> int:
        """Compile with many threads what a function launches by this runner, before it is called for its results; the
        number of kernels."""
        device = self._sampler.last_tokens.device
        graphs = self._graphs, self._source_graphs
        try:
            with rehearsing(self.model):
                return compile_ahead(compute, device)
        finally:
            self._graphs, self._source_graphs = graphs

    @contextmanager
    def briefly(self) -> Iterator[None]:
        """Within, steps launch all that they would launch, but not all of it again for every layer and every step.

        What comes of them is numbers and no more, and what they leave in the cache is not to be read.
        """
        self.kv.clear()  # what is skipped leaves zeros, where anything else might be no number
        with few_layers(self.model), nullcontext() if self._graphs is None else self._graphs.once():
            yield

    def rehearse_capture(self) -> None:
        """Do as `capture`, in a rehearsal."""
        with suppress(torch.OutOfMemoryError):
            graphs = RehearsedGraphs(self.static_steps())
            graphs.capture()
            self._graphs = graphs
            if self.model.spec.encoder is not None:
                sources = RehearsedTexts(self.static_sources(), self._source_sizes)
                sources.capture()
                self._source_graphs = sources

    def capture_decodes(self, count: int) -> None:
        """Have a graph of steps in which `count` sequences compute one token each; if there is none, it is captured.

        Raises:
            torch.OutOfMemoryError: there is no room for it; the others stay.
        """
        if self._graphs is None:
            self._graphs = StepGraphs([StaticDecodes(self._standing())])
        self._graphs.capture_for(count)

    def drop_graphs(self) -> None:
        """Free them and their memory: steps are computed without."""
        if not self._all_graphs:
            return
        if self.on_gpu:
            torch.cuda.synchronize(self.kv.layer(0)[0].device)  # one may be running
        self._graphs = self._source_graphs = None
        if self.on_gpu:
            torch.cuda.empty_cache()  # what was theirs is of no use to torch

    def static_steps(self) -> list[StaticStep]:
        """The kinds of steps that can become graphs."""
        standing = self._standing()
        decodes = StaticDecodes(standing)
        if self.model.spec.encoder is not None:
            return [decodes]
        return [decodes, StaticPrompts(standing, self._max_batch_tokens)]

    def _standing(self) -> Standing:
        return Standing(
            model=self.model,
            kv=self.kv,
            tables=self._device_tables(),
            sampler=self._sampler,
            num_rows=self._num_rows,
            max_model_len=self._max_model_len,
        )

    @property
    def _source_sizes(self) -> list[tuple[int, int]]:
        return sizes_of_batches(self._max_batch_tokens, self._num_rows)

    def static_sources(self) -> StaticTexts:
        """What an encoder reads for a decoder, in the form that can become graphs."""
        return StaticTexts(
            self._remembered,
            max_tokens=self._max_batch_tokens,
            max_texts=self._num_rows,
            max_model_len=self._max_model_len,
            device=self._sampler.last_tokens.device,
            spare_slot=self.kv.scratch_block * self.kv.block_size,
        )

    def _remembered(self, batch: Batch) -> tuple[()]:
        """Put what the decoder sees of sources into the cache; that is all, so a graph has nothing to keep."""
        self.model.encode(batch, self.kv)
        return ()

    def _device_tables(self) -> DeviceTables:
        max_blocks = -(-self._max_model_len // self.kv.block_size)
        return DeviceTables(
            self._num_rows,
            max_blocks,
            self.kv.scratch_block,
            self._sampler.last_tokens.device,
            sources=self.model.spec.encoder is not None,
        )

    @torch.inference_mode()
    def replay(self, sequences: Items[Sequence], tokens: Tensor) -> Tensor | None:
        """Start a step of decodes whose tokens somebody else chooses, if there is a graph of it.

        Args:
            sequences: in the first rows, in this order; each expects a token, the one that is computed.
            tokens: [sequences] int64 on the device, what they expect.

        Returns:
            Logits [sequences, vocab], which the next step overwrites; None if there is no such graph.
        """
        if self._graphs is None:
            return None
        self._sampler.last_tokens[: len(sequences)].copy_(tokens)
        computed = self._graphs.run(Plan(tuple(Chunk(sequence, 1) for sequence in sequences)))
        return None if computed is None else computed.logits[: len(sequences)]

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Choices:
        """Start a step; it chooses a token for each chunk that reaches the end of what its sequence knows."""
        if plan.encodes:
            self._read_sources(plan.encodes)
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        computed = None if self._graphs is None else self._graphs.run(plan)
        if computed is None:
            return self._sampler.choose(self.model(self._builder.build(plan.chunks), self.kv), sampling)
        logits, tokens = (rows[: len(plan.chunks)] for rows in computed)
        if len(sampling) < len(plan.chunks):
            those = np.flatnonzero([chunk.samples for chunk in plan.chunks])
            logits, tokens = (rows.index_select(0, upload(those, rows.device)) for rows in (logits, tokens))
        return self._sampler.choose(logits, sampling, tokens)

    def _read_sources(self, sequences: Items[Sequence]) -> None:
        """Let the encoder read the sources of sequences that begin."""
        texts, graphs = [sequence.source for sequence in sequences], self._source_graphs
        if graphs is not None and (size := graphs.size_for(texts)) is not None:
            graphs.run(texts, size, self._builder.place_sources(sequences))
        else:
            self.model.encode(self._builder.build_sources(sequences), self.kv)


@contextmanager
def _room_for(what: str) -> Iterator[None]:
    """Go on without graphs if there is no memory for them."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        logger.warning(
            "There is no memory for CUDA graphs (%s); %s are computed without them, which is slower. Lower "
            "--kv-tokens or --max-num-seqs.",
            str(error).partition("\n")[0],
            what,
        )
