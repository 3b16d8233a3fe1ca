"""One encoder serving many texts in one process: assignments in, vectors or words for masks out, a step at a time.

To a leader it is an engine like the one that generates (`headrace.workers.engine`), and obeys the same laws. A step
reads whole texts, the oldest first, as many as the budget of tokens allows; each ends in the step that reads it, with
the reason "length": all of its items were sent. There is no cache: between steps nothing is held but the queue, and on
a GPU the batch that was launched last, for there the next one is launched before its vectors are read.
"""

from __future__ import annotations

import dataclasses
import logging
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headrace.card import ModelCard
from headrace.errors import DeadlineExceededError, HeadraceError, InternalError, InvalidRequestError
from headrace.kernels.tuning import MOST_ROWS
from headrace.messages import Assignment, Finish, Refusal, StreamId, TokenRun, unpack_tokens
from headrace.sampling import SamplingParams
from headrace.tasks import EMBED, FILL_MASK, PoolingParams
from headrace.workers.compilations import compilations
from headrace.workers.config import EngineConfig
from headrace.workers.encoder_results import Items, Results, Text
from headrace.workers.encoder_runner import EncoderRunner
from headrace.workers.engine import StepResult
from headrace.workers.graph_memory import GraphMemory, compared
from headrace.workers.served import model_len
from headrace.workers.token_checks import largest_id
from headrace.workers.warmup import lengths_up_to

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["EncoderEngine"]

logger = logging.getLogger(__name__)

_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One stream: its text, how many of its items an earlier attempt sent, and until when it may be computed."""

    stream: StreamId
    text: Text
    sent: int
    deadline: float | None


class _Launched(NamedTuple):
    """A batch on its way: its streams, and what comes of them."""

    batch: list[_Waiting]
    results: Results


class EncoderEngine:
    """An encoder with its queue.

    Attributes:
        card: describes the model as served.
        blobs: files named by the card, by name.
        config: the settings in force.
        max_num_seqs: texts that one step reads at most.
        kv_tokens: tokens of all texts that it holds at most. There is no cache, but a broker goes by its size.
    """

    def __init__(
        self,
        model: Model,
        card: ModelCard,
        config: EngineConfig,
        *,
        blobs: dict[str, bytes] | None = None,
        graph_memory: GraphMemory | None = None,
    ) -> None:
        max_model_len = model_len(card, config)
        self.card = dataclasses.replace(card, max_model_len=max_model_len)
        self.blobs = blobs or {}
        self.config = config
        self.max_num_seqs = config.max_num_seqs
        self.kv_tokens = config.max_num_seqs * max_model_len
        self._step_tokens = max(config.max_batch_tokens, max_model_len)  # any text is read whole
        self._runner = EncoderRunner(
            model, max_tokens=self._step_tokens, max_texts=self.max_num_seqs, max_model_len=max_model_len
        )
        self._graph_memory = graph_memory  # kept for graphs, to be compared with what they take
        # In order of arrival; a stream whose text was launched stays until its items are sent.
        self._queue: dict[tuple[bytes, int], _Waiting] = {}
        self._pending = StepResult()  # ends found outside of a step
        self._launched: deque[_Launched] = deque()  # batches whose results were not read yet
        ahead = self._runner.on_gpu if config.async_scheduling is None else config.async_scheduling
        self._most_launched = int(ahead)  # between two calls
        self._steps = 0
        self._prompt_tokens = 0
        self._compiled = compilations()  # before it was ready

    # ---------------------------------------------------------------------------------------------------- streams

    def add(self, assignment: Assignment, now: float) -> None:
        """Take a text on. An earlier attempt at it is dropped; the same or an older attempt changes nothing.

        Raises:
            RequestError: it cannot be served; what to do is in the message.
        """
        key = (assignment.request, assignment.choice)
        if (held := self._queue.get(key)) is not None:
            if held.stream.attempt >= assignment.attempt:
                return
            del self._queue[key]
        waiting = self._waiting(assignment, now)
        if waiting.sent >= self._num_items(waiting.text):
            self._pending.finishes.append(_finish(waiting, waiting.sent))
            return
        self._queue[key] = waiting

    def revoke(self, stream: StreamId) -> None:
        """Drop a stream without a word; unknown ones, and attempts newer than the named one, are left alone."""
        key = (stream.request, stream.choice)
        if (held := self._queue.get(key)) is not None and held.stream.attempt <= stream.attempt:
            del self._queue[key]

    def revoke_all(self) -> None:
        """Drop all streams without a word."""
        self._queue.clear()
        self._pending = StepResult()

    def running(self) -> tuple[StreamId, ...]:
        """All streams on hand."""
        return tuple(waiting.stream for waiting in self._queue.values())

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._queue or self._pending.finishes or self._launched)

    # ------------------------------------------------------------------------------------------------------ steps

    @property
    def steps(self) -> int:
        """Steps computed since the start."""
        return self._steps

    def step(self, now: float) -> StepResult:
        """Launch one batch and send what came of the one before, or of itself; returns at once if there is nothing to
        do.

        Raises:
            Exception: a batch could not be computed. Its texts wait again, and what else was launched is read later.
        """
        result, self._pending = self._pending, StepResult()
        for waiting in self._unread():
            if waiting.deadline is not None and now >= waiting.deadline:
                self._refuse(waiting, _too_late(waiting), result)
        launched = self._launch(self._next())
        while len(self._launched) > (self._most_launched if launched else 0):
            self._read(result)
        return result

    def _launch(self, batch: list[_Waiting]) -> bool:
        """Start to compute a batch, if there is one; whether it was started."""
        if not batch:
            return False
        try:
            results = self._runner.launch([waiting.text for waiting in batch])
        except Exception as error:
            if not self._launched:
                raise
            # It must not cost the batch that is on its way. Alone this one is tried again, which may have lacked only
            # memory; an error then is told.
            logger.warning("A batch could not be launched behind another (%r); it is tried again alone.", error)
            return False
        self._launched.append(_Launched(batch, results))
        return True

    def _read(self, result: StepResult) -> None:
        """Send what came of the oldest batch that was launched; this waits for it."""
        batch, results = self._launched.popleft()
        items = results.read()
        self._steps += 1
        for waiting, made in zip(batch, items, strict=True):
            self._prompt_tokens += len(waiting.text.tokens)
            # A stream may have been dropped since the batch was launched, or another attempt have taken its place.
            if self._queue.get(_key(waiting)) is not waiting:
                continue
            if made is None:
                self._refuse(waiting, _not_numbers(waiting), result)
            else:
                self._send(waiting, made, result)

    def warm_up(self, told: Callable[[str], None] = lambda phase: None) -> None:
        """Compute texts of many lengths on a GPU, and the longest there can be anywhere, so that the first request
        finds everything in place; `told` hears "kernels"."""
        assert not self.has_work, "warm up before taking texts on"
        told("kernels")
        if self._runner.on_gpu:
            self._runner.compile_ahead(self._rehearse)
        self._compute_examples()
        if self.config.cuda_graphs and self._runner.on_gpu:
            told("graphs")
            with compared(self._graph_memory):
                self._runner.capture()
        self._compiled = compilations()

    def _rehearse(self) -> None:
        self._compute_examples()
        if self.config.cuda_graphs:
            self._runner.rehearse_capture()

    def _compute_examples(self) -> None:
        longest = self.card.max_model_len
        tokens = array("I", (index % self.card.vocab_size for index in range(longest)))
        for length in lengths_up_to(longest) if self._runner.on_gpu else (longest,):
            self._runner.launch([Text(tokens=tokens[:length], pooling=PoolingParams())]).read()
        if self._runner.on_gpu:
            many = min(self.max_num_seqs, self._step_tokens // longest)  # more tokens than one text can have
            self._runner.launch([Text(tokens=tokens, pooling=PoolingParams())] * many).read()
            for pooling in ("cls", "mean"):
                text = Text(tokens=tokens[:7], pooling=PoolingParams(pooling=pooling, dimensions=1, normalize=True))
                self._runner.launch([text] * min(3, self.max_num_seqs)).read()
        if FILL_MASK in self.card.tasks:
            for count in lengths_up_to(min(MOST_ROWS, self.kv_tokens)) if self._runner.on_gpu else (1,):
                self._runner.launch(self._masks(count)).read()

    def _masks(self, count: int) -> list[Text]:
        """Texts that have so many masks together."""
        lens = [min(count - start, self.card.max_model_len) for start in range(0, count, self.card.max_model_len)]
        return [Text(tokens=array("I", bytes(4 * length)), masks=tuple(range(length)), top=1) for length in lens]

    def load_gauges(self) -> dict[str, int | float]:
        """Figures for heartbeats and metrics."""
        return {
            "running": 0,
            "waiting": len(self._queue),
            "prompt_tokens": self._prompt_tokens,
            "graph_replays": self._runner.num_replays,
            "graphs": self._runner.num_graphs,
            "compilations": compilations() - self._compiled,
        }

    def validate(self) -> None:
        """Assert the invariants."""
        for (request, choice), waiting in self._queue.items():
            assert waiting.stream[:2] == (request, choice)
            assert waiting.sent < self._num_items(waiting.text), "a complete text waits"

    # ---------------------------------------------------------------------------------------------------- details

    def _unread(self) -> list[_Waiting]:
        """Streams whose texts were not launched, in order of arrival."""
        launched = {id(waiting) for batch, _ in self._launched for waiting in batch}
        return [waiting for waiting in self._queue.values() if id(waiting) not in launched]

    def _next(self) -> list[_Waiting]:
        """The oldest texts that wait to be read and fit into one step."""
        batch: list[_Waiting] = []
        room = self._step_tokens
        for waiting in self._unread():
            room -= len(waiting.text.tokens)
            if room < 0 or len(batch) == self.max_num_seqs:
                break
            batch.append(waiting)
        return batch

    def _waiting(self, assignment: Assignment, now: float) -> _Waiting:
        stream = StreamId(assignment.request, assignment.choice, assignment.attempt)
        tokens = unpack_tokens(assignment.prompt)
        self._check(assignment, tokens)
        if assignment.task == EMBED:
            text = Text(tokens=tokens, pooling=PoolingParams.from_wire(assignment.pooling))
        else:
            masks = tuple(place for place, token in enumerate(tokens) if token == self.card.mask_token_id)
            text = Text(tokens=tokens, masks=masks, top=SamplingParams.from_wire(assignment.sampling).logprobs)
        deadline = None if assignment.budget_ms is None else now + assignment.budget_ms / 1000
        return _Waiting(stream, text, len(assignment.output) // _ITEM_BYTES, deadline)

    def _check(self, assignment: Assignment, tokens: array[int]) -> None:
        if assignment.task not in self.card.tasks:
            raise InvalidRequestError(
                f"{self.card.name} was asked to {assignment.task}, but it can {' and '.join(self.card.tasks)}; choose "
                "another model.",
                param="model",
            )
        if not 0 < len(tokens) <= self.card.max_model_len:
            raise InvalidRequestError(
                f"The text has {len(tokens):,} tokens; give 1 to {self.card.max_model_len:,}.", param="prompt"
            )
        if (largest := largest_id(tokens)) >= self.card.vocab_size:
            raise InvalidRequestError(
                f"The text holds token id {largest}, but {self.card.name} has ids 0 to {self.card.vocab_size - 1}; use "
                "the tokenizer that its card names.",
                param="prompt",
            )

    def _num_items(self, text: Text) -> int:
        if text.pooling is None:
            return len(text.masks)
        return min(text.pooling.dimensions or self.card.embedding_size, self.card.embedding_size)

    def _send(self, waiting: _Waiting, items: Items, result: StepResult) -> None:
        sent = waiting.sent
        logprobs = None if items.logprobs is None else items.logprobs[sent:]
        result.runs.append(TokenRun(*waiting.stream, sent, items.packed[sent * _ITEM_BYTES :], logprobs))
        result.finishes.append(_finish(waiting, len(items.packed) // _ITEM_BYTES))
        self._drop(waiting)

    def _refuse(self, waiting: _Waiting, error: HeadraceError, result: StepResult) -> None:
        result.refusals.append(Refusal(*waiting.stream, error.to_wire()))
        self._drop(waiting)

    def _drop(self, waiting: _Waiting) -> None:
        del self._queue[_key(waiting)]


def _key(waiting: _Waiting) -> tuple[bytes, int]:
    return waiting.stream.request, waiting.stream.choice


def _finish(waiting: _Waiting, total: int) -> Finish:
    return Finish(*waiting.stream, "length", total, 0)


def _too_late(waiting: _Waiting) -> DeadlineExceededError:
    return DeadlineExceededError(
        "The time allowed was over before the text was read; give more time.", request_id=waiting.stream.request.hex()
    )


def _not_numbers(waiting: _Waiting) -> InternalError:
    return InternalError(
        "What the model made of the text holds NaN or infinity; other requests go on. If it happens again, the weights "
        "are damaged or the dtype is too narrow: try float32.",
        request_id=waiting.stream.request.hex(),
    )
