"""One model serving many streams in one process: assignments in, tokens out, a step at a time.

The engine knows no socket and no clock: `now` is an argument, in monotonic seconds. Every rank of a group makes the
same calls in the same order and so computes the same steps. On a GPU it goes one step ahead: a step is launched before
the tokens of the last one are read, which are the result. A stream ends with

    stop    the model chose one of its end tokens or the request's stop_token_ids; that token is neither sent nor
            counted, so what was sent is exactly the text
    length  max_tokens were sent

or with a refusal: past its deadline, or its logits were not numbers (which ends that stream alone).
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from headrace.card import ModelCard
from headrace.errors import HeadraceError, InvalidRequestError
from headrace.messages import Assignment, Finish, Refusal, StreamId, TokenRun, pack_tokens, unpack_tokens
from headrace.sampling import SamplingParams
from headrace.tasks import GENERATE
from headrace.workers.compilations import compilations
from headrace.workers.config import EngineConfig
from headrace.workers.graph_memory import GraphMemory, compared
from headrace.workers.parallel_compile import compiled_ahead
from headrace.workers.runner import Runner
from headrace.workers.sampler import Choice, Choices
from headrace.workers.scheduler import Filled, Plan, Scheduler
from headrace.workers.sequence import Sequence
from headrace.workers.served import model_len, num_blocks, start_token_of
from headrace.workers.stream_errors import not_numbers, too_late
from headrace.workers.token_checks import check_tokens
from headrace.workers.warmup import examples

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["Engine", "EngineConfig", "StepResult"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step sends: new tokens, ends, and streams that cannot go on."""

    runs: list[TokenRun] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


class Engine:
    """A model with its scheduler and KV cache.

    Args:
        model: with its weights.
        card: of it.
        config: the settings.
        blobs: files named by the card, by name.
        start_token: that an encoder-decoder's texts begin with.
        max_model_len: most tokens of a text, for an engine that only rehearses; others may have as many as their cache
            holds.
        rehearsed: the `max_model_len` for which all that warming up needs was compiled ahead.
        graph_memory: kept for graphs, to be compared with what they take.

    Attributes:
        card: describes the model as served, with the context length that the KV cache allows.
        blobs: files named by the card, by name.
        config: the settings in force.
        max_num_seqs: streams that run at once.
        kv_tokens: tokens the KV cache holds.

    Raises:
        ConfigError: a setting does not fit the model.
        ModelFilesError: neither config nor `start_token` says what an encoder-decoder's texts begin with.
    """

    def __init__(
        self,
        model: Model,
        card: ModelCard,
        config: EngineConfig,
        *,
        blobs: dict[str, bytes] | None = None,
        start_token: int | None = None,
        max_model_len: int | None = None,
        rehearsed: int | None = None,
        graph_memory: GraphMemory | None = None,
    ) -> None:
        limit = model_len(card, config)
        blocks = num_blocks(model, config, limit)
        max_model_len = max_model_len or min(limit, blocks * config.block_size)
        self.card = dataclasses.replace(card, max_model_len=max_model_len)
        self.blobs = blobs or {}
        self.config = config
        self.max_num_seqs = config.max_num_seqs
        self.kv_tokens = blocks * config.block_size
        self._rehearsed, self._graph_memory = rehearsed, graph_memory
        # What a decoder with an encoder computes depends on more than its own tokens.
        self._scheduler = self._new_scheduler(prefix_cache=config.prefix_cache and model.spec.encoder is None)
        self._runner = Runner(
            model,
            num_blocks=blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=max_model_len,
        )
        # What an encoder-decoder's text begins with; None for a decoder, which goes on with its prompt.
        self._start_token = start_token_of(model.spec, card, start_token)
        self._sequences: dict[tuple[bytes, int], Sequence] = {}
        self._pending = StepResult()  # ends found outside of a step
        self._launched: deque[_Launched] = deque()  # steps whose tokens were not read yet
        ahead = self._runner.on_gpu if config.async_scheduling is None else config.async_scheduling
        self._most_launched = int(ahead)  # between two calls
        self._steps = 0
        self._generated_tokens = 0
        self._prompt_tokens = 0
        self._compiled = compilations()  # before it was ready

    # ---------------------------------------------------------------------------------------------------- streams

    def add(self, assignment: Assignment, now: float) -> None:
        """Take a stream on. An earlier attempt at it is dropped; the same or an older attempt changes nothing.

        Raises:
            RequestError: it cannot be served; what to do is in the message.
        """
        key = (assignment.request, assignment.choice)
        if (held := self._sequences.get(key)) is not None:
            if held.stream.attempt >= assignment.attempt:
                return
            self._drop(held)
        sequence = self._sequence(assignment, now)
        if sequence.num_output >= sequence.max_tokens:
            self._pending.finishes.append(_finish(sequence, "length"))
            return
        self._sequences[key] = sequence
        self._scheduler.add(sequence)

    def revoke(self, stream: StreamId) -> None:
        """Drop a stream without a word; unknown ones, and attempts newer than the named one, are left alone."""
        held = self._sequences.get((stream.request, stream.choice))
        if held is not None and held.stream.attempt <= stream.attempt:
            self._drop(held)

    def revoke_all(self) -> None:
        """Drop all streams without a word."""
        for sequence in list(self._sequences.values()):
            self._drop(sequence)
        self._pending = StepResult()

    def running(self) -> tuple[StreamId, ...]:
        """All streams on hand, waiting ones included."""
        return tuple(sequence.stream for sequence in self._sequences.values())

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences or self._pending.finishes or self._launched)

    # ------------------------------------------------------------------------------------------------------ steps

    @property
    def steps(self) -> int:
        """Steps computed since the start."""
        return self._steps

    def step(self, now: float) -> StepResult:
        """Launch one step and take the tokens of the one before, or of itself; returns at once if there is nothing
        to do."""
        result, self._pending = self._pending, StepResult()
        for sequence in self._scheduler.expired(now):
            self._refuse(sequence, too_late(sequence), result)
        plan = self._scheduler.schedule()
        if plan.chunks:
            self._launch(plan)
        else:
            assert self._launched or not self._sequences, "sequences wait, but none can run"
        while len(self._launched) > (self._most_launched if plan.chunks else 0):
            self._read(result)
        return result

    def _launch(self, plan: Plan) -> None:
        """Start a step; from here on its tokens are expected."""
        self._prompt_tokens += sum(_num_prompt_tokens(sequence, count) for sequence, count in plan.chunks)
        self._prompt_tokens += sum(len(sequence.source) for sequence in plan.encodes)
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        choices = self._runner.launch(plan)
        self._launched.append(_Launched(choices, self._scheduler.advance(plan)))
        for sequence in sampling:
            sequence.expect()

    def _read(self, result: StepResult) -> None:
        """Take the tokens of the oldest step that was launched; this waits for it."""
        choices, filled = self._launched.popleft()
        # While it computes: what filled the blocks was known to the host when the step before it had been read.
        self._scheduler.publish(filled)
        chosen = choices.read()
        self._steps += 1
        for choice in chosen:
            # A stream may have ended, or been dropped, since the step was launched.
            if self._sequences.get(_key(choice.sequence)) is choice.sequence:
                self._take(choice, result)

    def warm_up(self, told: Callable[[str], None] = lambda phase: None) -> None:
        """Capture graphs, and compute what compiles all that serving needs, so that the first request finds everything
        in place; `told` hears "graphs", if there are any, then "kernels"."""
        assert not self._sequences, "warm up before taking streams on"
        counters = (self._generated_tokens, self._prompt_tokens, dataclasses.replace(self._scheduler.stats))
        on_gpu = self._runner.on_gpu
        told("graphs" if self._has_graphs else "kernels")
        if self._rehearsed != self.card.max_model_len:
            self.compile_examples()
        self._compute_examples(everything=False)
        if self._has_graphs:
            with compared(self._graph_memory):
                self._runner.capture()
            told("kernels")
        if on_gpu:  # by graphs where there are any, as they will be used
            with self._without_prefixes(), self._runner.briefly():
                self._compute_examples(everything=True)
        self._generated_tokens, self._prompt_tokens, self._scheduler.stats = counters
        self._runner.forget_replays()
        self._compiled = compilations()

    def compile_ahead(self, compute: Callable[[], None]) -> int:
        """Compile with many threads what a function needs that adds streams and computes them to their ends, before it
        is called for their sake; the number of kernels. On a CPU there are none."""
        assert not self._sequences, "compile before taking streams on"
        if not self._runner.on_gpu:
            return 0
        with self._without_prefixes():
            return self._runner.compile_ahead(compute)

    def compile_examples(self) -> None:
        """Compile with many threads what warming up needs; `warm_up` does it unless it was told that it was done."""
        # Where sizing the cache had nothing to compile, and a small text has not either, an earlier start has kept all.
        if compiled_ahead().kernels or self.compile_ahead(partial(self._compute_examples, everything=False)):
            self.compile_ahead(self._rehearse)

    @property
    def _has_graphs(self) -> bool:
        return self.config.cuda_graphs and self._runner.on_gpu

    @contextmanager
    def _without_prefixes(self) -> Iterator[None]:
        """Within, streams leave no blocks to be found by others: nobody fills them with what they should hold."""
        served, self._scheduler = self._scheduler, self._new_scheduler(prefix_cache=False)
        try:
            yield
        finally:
            self._scheduler = served

    def _rehearse(self) -> None:
        self._compute_examples(everything=False)
        if self._has_graphs:
            self._runner.rehearse_capture()
        self._compute_examples(everything=True)

    def capture_decodes(self, count: int) -> None:
        """Have a graph of steps in which `count` streams get a token each; raises torch.OutOfMemoryError."""
        self._runner.capture_decodes(min(count, self.max_num_seqs))

    def forget_prefixes(self) -> None:
        """Find no more keys and values of before for new streams, since the weights are other ones now."""
        self._scheduler.forget_prefixes()

    def drop_graphs(self) -> None:
        """Free all graphs; steps are computed without."""
        self._runner.drop_graphs()

    def _compute_examples(self, *, everything: bool) -> None:
        sources = self._start_token is not None
        for streams in examples(self.card, self.config, sources=sources, everything=everything):
            for assignment in streams:
                self.add(assignment, 0.0)
            while self.has_work:
                self.step(0.0)

    def load_gauges(self) -> dict[str, int | float]:
        """Figures for heartbeats and metrics."""
        scheduler = self._scheduler
        return {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "kv_blocks_total": scheduler.blocks.num_blocks,
            "kv_blocks_free": scheduler.blocks.num_available,
            "prefix_hits": scheduler.stats.prefix_hits,
            "prefix_queries": scheduler.stats.prefix_queries,
            "preemptions": scheduler.stats.preemptions,
            "graph_replays": self._runner.num_replays,
            "graphs": self._runner.num_graphs,
            "compilations": compilations() - self._compiled,
            "generated_tokens": self._generated_tokens,
            "prompt_tokens": self._prompt_tokens,
        }

    def validate(self) -> None:
        """Assert the invariants."""
        self._scheduler.validate()
        held = [id(sequence) for sequence in self._sequences.values()]
        assert sorted(held) == sorted(map(id, self._scheduler)), "engine and scheduler hold different sequences"

    # ---------------------------------------------------------------------------------------------------- details

    def _new_scheduler(self, *, prefix_cache: bool) -> Scheduler:
        return Scheduler(
            num_blocks=self.kv_tokens // self.config.block_size,
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_batch_tokens=self.config.max_batch_tokens,
            max_model_len=self.card.max_model_len,
            prefix_cache=prefix_cache,
            salt=self.card.fingerprint.encode(),
        )

    def _sequence(self, assignment: Assignment, now: float) -> Sequence:
        if assignment.task != GENERATE:
            raise InvalidRequestError(
                f"{self.card.name} generates text and cannot {assignment.task}; choose an encoder such as a BertModel.",
                param="model",
            )
        sampling = SamplingParams.from_wire(assignment.sampling)
        prompt, output = unpack_tokens(assignment.prompt), unpack_tokens(assignment.output)
        check_tokens(self.card, prompt, output, sampling)
        source = None
        if self._start_token is not None:
            source, prompt = prompt, array("I", [self._start_token])
        eos = () if sampling.ignore_eos else self.card.eos_token_ids
        vocab = self.card.vocab_size
        return Sequence(
            StreamId(assignment.request, assignment.choice, assignment.attempt),
            prompt,
            sampling,
            max_tokens=self._scheduler.resolve_max_tokens(len(prompt), sampling.max_tokens, len(source or ())),
            output=output,
            source=source,
            stop_ids=tuple(dict.fromkeys(id for id in (*eos, *sampling.stop_token_ids) if id < vocab)),
            seed=_seed(assignment.request) if sampling.seed is None else sampling.seed,
            deadline=None if assignment.budget_ms is None else now + assignment.budget_ms / 1000,
        )

    def _take(self, choice: Choice, result: StepResult) -> None:
        sequence = choice.sequence
        if choice.token is None:
            self._refuse(sequence, not_numbers(sequence), result)
            return
        before = sequence.num_output
        reason = sequence.append(choice.token)
        if sequence.num_output > before:
            self._generated_tokens += 1
            logprobs = None if choice.logprobs is None else [choice.logprobs]
            result.runs.append(TokenRun(*sequence.stream, before, pack_tokens((choice.token,)), logprobs))
        if reason is not None:
            result.finishes.append(_finish(sequence, reason))
            self._drop(sequence)

    def _refuse(self, sequence: Sequence, error: HeadraceError, result: StepResult) -> None:
        result.refusals.append(Refusal(*sequence.stream, error.to_wire()))
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[_key(sequence)]
        self._scheduler.remove(sequence)


class _Launched(NamedTuple):
    """A step on its way: its choices, and the blocks that it fills."""

    choices: Choices
    filled: list[Filled]


def _key(sequence: Sequence) -> tuple[bytes, int]:
    return sequence.stream.request, sequence.stream.choice


def _num_prompt_tokens(sequence: Sequence, count: int) -> int:
    """How many of the next `count` tokens belong to the prompt as it was given."""
    return 0 if sequence.source else max(0, min(count, sequence.num_prompt - sequence.num_computed))


def _finish(sequence: Sequence, reason: str) -> Finish:
    return Finish(*sequence.stream, reason, sequence.num_output, max(0, sequence.num_cached))


def _seed(request: bytes) -> int:
    """The seed of a request that brought none: the same on every rank and in every attempt."""
    return int.from_bytes(hashlib.blake2b(request, digest_size=8).digest(), "little")
