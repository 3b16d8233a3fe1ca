"""The request table: what the broker knows of every request, running or finished. Decides nothing.

A request (`Job`) has one `Stream` per choice. A stream is in exactly one place:

    queued    `lane` is the part of a queue that holds it
    running   `group` is the group that has its present attempt
    ended     `finish` is known, or the job has an `error`

`have` tokens are in `output`; the client was sent those below `sent` and confirmed those below `acked`. Nothing is
dropped from `output` before the job is: after the death of a group it is replayed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.errors import HeadraceError
from headrace.messages import Finish, StreamId, TokenRun
from headrace.tasks import GENERATE

if TYPE_CHECKING:
    from headrace.broker.delivery import Connection
    from headrace.broker.groups import Group

__all__ = ["TOKEN_BYTES", "Job", "JobTable", "Stream"]

TOKEN_BYTES = 4
_MAX_TOMBSTONES = 4096


class Stream:
    """One choice of a request."""

    __slots__ = (
        "acked",
        "attempt",
        "base",
        "choice",
        "done_sent",
        "final_acked",
        "fingerprint",
        "finish",
        "first_step",
        "group",
        "have",
        "job",
        "lane",
        "logprobs",
        "marks",
        "output",
        "probation",
        "progress_at",
        "redispatches",
        "sent",
    )

    def __init__(self, job: Job, choice: int, attempt: int, output: bytes, fingerprint: str) -> None:
        self.job = job
        self.choice = choice
        self.attempt = attempt
        self.lane: OrderedDict[Stream, None] | None = None
        self.group: Group | None = None
        self.finish: Finish | None = None
        self.done_sent = False
        self.final_acked = False
        self.marks = 0  # deaths of groups it was aboard
        self.probation = 0  # steps to run apart from other unproven streams
        self.redispatches = 0
        self.first_step = -1  # the group's step counter at the first token of this attempt
        self.progress_at = 0.0  # last time its reader moved, or began to owe an acknowledgement
        self.logprobs: list[Any] | None = None if job.sampling.get("logprobs") is None else []
        self.adopt(output, fingerprint)

    def adopt(self, output: bytes, fingerprint: str) -> None:
        """Take what the client holds for the truth."""
        self.output = bytearray(output)
        self.have = self.base = self.sent = self.acked = len(output) // TOKEN_BYTES
        self.fingerprint = fingerprint  # of the model that made `output`; empty while there is none
        if self.logprobs is not None:
            self.logprobs = []

    @property
    def ended(self) -> bool:
        """Whether no group needs to work on it any more."""
        return self.finish is not None or self.job.error is not None

    @property
    def weight(self) -> int:
        """Bytes that one of its tokens costs on the wire, roughly."""
        return self.job.weight

    @property
    def id(self) -> StreamId:
        """Its name on the workers' side, this attempt."""
        return StreamId(self.job.id, self.choice, self.attempt)

    def run(self, first: int, count: int) -> TokenRun:
        """Tokens `first` to `first + count` for the client."""
        tokens = bytes(self.output[first * TOKEN_BYTES : (first + count) * TOKEN_BYTES])
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs = logprobs[first - self.base : first - self.base + count]
        return TokenRun(self.job.id, self.choice, self.attempt, first, tokens, logprobs)

    def conclusion(self) -> str | None:
        """The reason to end that its tokens alone show: its group died after the last token, before saying so."""
        # As an engine says it: a stop token that is also the last one allowed is a stop.
        if self.have and self.have >= int(self.job.sampling.get("min_tokens", 0)):
            last = int.from_bytes(self.output[-TOKEN_BYTES:], "little")
            if last in self.job.stops:
                return "stop"
        return "length" if self.have >= self.job.max_tokens else None


class Job:
    """One request with all its choices.

    Attributes:
        prompt: packed token ids; empty once the job ended.
        sampling: checked settings with seed and max_tokens in force, as leaders get them.
        digest: hash of what makes the request the same request.
        stops: token ids that end a stream.
        task: what is asked for.
        pooling: how a vector is made, as leaders get it.
        deadline: on the broker's clock, or None.
        client: the connection that reads it, None while its client is away.
        weight: bytes per token on the wire.
        plain: whether its items are tokens without anything beside them.
    """

    __slots__ = (
        "client",
        "created_at",
        "deadline",
        "digest",
        "ended_at",
        "error",
        "id",
        "max_tokens",
        "model",
        "owner",
        "plain",
        "pooling",
        "prompt",
        "prompt_tokens",
        "sampling",
        "seed",
        "stops",
        "streams",
        "task",
        "weight",
    )

    def __init__(
        self,
        *,
        id: bytes,
        model: str,
        prompt: bytes,
        sampling: dict[str, Any],
        digest: bytes,
        stops: frozenset[int],
        deadline: float | None,
        owner: bytes,
        now: float,
        task: str = GENERATE,
        pooling: dict[str, Any] | None = None,
    ) -> None:
        self.id = id
        self.model = model
        self.prompt = prompt
        self.prompt_tokens = len(prompt) // TOKEN_BYTES
        self.sampling = sampling
        self.task = task
        self.pooling = pooling or {}
        self.seed = int(sampling["seed"])
        self.max_tokens = int(sampling["max_tokens"])
        self.digest = digest
        self.stops = stops
        self.deadline = deadline
        self.owner = owner  # whose share of the queue it uses
        self.created_at = now
        self.ended_at: float | None = None
        self.error: HeadraceError | None = None
        self.client: Connection | None = None
        self.streams: list[Stream] = []
        logprobs = sampling.get("logprobs")
        self.weight = TOKEN_BYTES if logprobs is None else TOKEN_BYTES + 16 * (1 + int(logprobs))
        self.plain = logprobs is None and task == GENERATE

    @property
    def ended(self) -> bool:
        """Whether every choice has ended."""
        return self.ended_at is not None

    @property
    def context(self) -> int:
        """Most tokens that a group must hold at once for one of its streams."""
        return self.prompt_tokens + (self.max_tokens if self.task == GENERATE else 0)

    @property
    def owed(self) -> bool:
        """Whether its reader has not confirmed all of it."""
        if self.client is None:
            return False
        return self.error is not None or any(s.acked < s.have or not s.done_sent for s in self.streams)

    @property
    def size(self) -> int:
        """Bytes that its answer holds in memory, roughly."""
        return 512 + len(self.prompt) + sum(stream.have * self.weight for stream in self.streams)


class JobTable:
    """All jobs by id: live ones, and ended ones for as long as their ids stay idempotent."""

    def __init__(self, *, window: float, max_ended: int, max_ended_bytes: int) -> None:
        self.live: dict[bytes, Job] = {}
        self.ended: OrderedDict[bytes, Job] = OrderedDict()
        self._window = window
        self._max_ended = max_ended
        self._max_ended_bytes = max_ended_bytes
        self._ended_bytes = 0
        self._tombstones: OrderedDict[bytes, int] = OrderedDict()

    def get(self, id: bytes) -> Job | None:
        """The job of this id, live or ended."""
        return self.live.get(id) or self.ended.get(id)

    def add(self, job: Job) -> None:
        """A new live job."""
        assert self.get(job.id) is None
        self.live[job.id] = job

    def end(self, job: Job, now: float) -> None:
        """Keep the answer, free the prompt, forget old answers if there are too many."""
        del self.live[job.id]
        job.ended_at = now
        job.prompt = b""
        self.ended[job.id] = job
        self._ended_bytes += job.size
        self._trim()

    def revive(self, job: Job, prompt: bytes) -> None:
        """An ended job becomes live again: its client holds more of it than we do."""
        self._ended_bytes -= job.size
        del self.ended[job.id]
        job.ended_at = None
        job.prompt = prompt
        self.live[job.id] = job

    def forget(self, job: Job) -> None:
        """Drop a live job; should its client come back, attempts go on from here."""
        del self.live[job.id]
        self._tombstones[job.id] = max(stream.attempt for stream in job.streams)
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)

    def last_attempt(self, id: bytes) -> int:
        """The highest attempt of a forgotten job, 0 if there was none."""
        return self._tombstones.get(id, 0)

    def expire(self, now: float) -> None:
        """Forget answers older than the window, unless somebody still reads them."""
        old = itertools.takewhile(lambda job: now - (job.ended_at or 0.0) > self._window, self.ended.values())
        for job in [job for job in old if not job.owed]:
            self._evict(job)
        self._trim()

    def _trim(self) -> None:
        """Keep within the bounds; an answer on its way to a reader is not dropped, its reader has bounds of its own."""
        while len(self.ended) > self._max_ended or self._ended_bytes > self._max_ended_bytes:
            job = next((job for job in self.ended.values() if not job.owed), None)
            if job is None:
                return
            self._evict(job)

    def _evict(self, job: Job) -> None:
        del self.ended[job.id]
        self._ended_bytes -= job.size
        if job.client is not None:
            job.client.release(job)

    def streams(self) -> Iterator[Stream]:
        """Every stream of every live job."""
        for job in self.live.values():
            yield from job.streams

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert not self.live.keys() & self.ended.keys()
        assert self._ended_bytes == sum(job.size for job in self.ended.values())
        for job in (*self.live.values(), *self.ended.values()):
            assert job.ended == (job.id in self.ended)
            assert job.ended == (job.error is not None or all(s.finish is not None for s in job.streams))
            for stream in job.streams:
                _validate_stream(stream)


def _validate_stream(stream: Stream) -> None:
    assert len(stream.output) == stream.have * TOKEN_BYTES
    assert 0 <= stream.acked <= stream.sent <= stream.have <= stream.job.max_tokens
    assert stream.logprobs is None or len(stream.logprobs) == stream.have - stream.base
    places = (stream.lane is not None, stream.group is not None, stream.ended)
    assert sum(places) == 1, places
    if stream.group is not None:
        assert stream.group.streams.get(stream.id) is stream
    if stream.lane is not None:
        assert stream in stream.lane
    if stream.finish is not None:
        assert stream.finish.total == stream.have
    if stream.done_sent:
        assert stream.sent == stream.have
