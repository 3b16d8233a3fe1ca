"""What leaders say of the streams they run: tokens, ends, refusals.

Law: output counts only if it comes from the group that has the stream now, under the attempt it has now, at the next
index. Anything else is late (dropped and counted) or a fault of that attempt (run again).
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.broker.delivery import Delivery
from headrace.broker.groups import Group, GroupState, Registry
from headrace.broker.lives import Lives
from headrace.broker.replays import Replays
from headrace.broker.report import Counters
from headrace.broker.requests import TOKEN_BYTES, Stream
from headrace.errors import OverloadedError, UnavailableError, from_wire
from headrace.messages import Finish, Refusal, TokenRun, Tokens
from headrace.tasks import GENERATE

__all__ = ["Intake"]


class Intake:
    """Takes the groups' output into the request table."""

    def __init__(
        self, registry: Registry, lives: Lives, replays: Replays, delivery: Delivery, counters: Counters
    ) -> None:
        self._registry = registry
        self._lives = lives
        self._replays = replays
        self._delivery = delivery
        self._counters = counters

    def take_tokens(self, group: Group, message: Tokens, now: float) -> None:
        """Output of one step. The hot path: hundreds of thousands of runs a second pass here."""
        if message.step:
            group.advance(message.step, now)
        streams = group.streams
        taken = 0
        for run in message.runs:
            stream = streams.get(run[:3])
            if stream is None:
                self._counters.stale_frames += 1
                continue
            tokens = run[4]
            size = len(tokens)
            have = stream.have
            job = stream.job
            count = size >> 2
            plain = run[3] == have and size & 3 == 0 and 0 < count <= job.max_tokens - have
            if not plain or not job.plain or run[5] is not None:
                taken += self._take_unusual(stream, run, now)
                continue
            if stream.first_step < 0:
                self._begin(stream, group)
            stream.output += tokens
            stream.have = have + count
            taken += count
            conn = job.client
            if conn is not None:
                dirty = conn.dirty
                dirty[stream] = None if stream in dirty else run
                self._delivery.waiting[conn] = None
        self._counters.tokens += taken
        self.review(group)

    def _begin(self, stream: Stream, group: Group) -> None:
        stream.first_step = group.step
        stream.fingerprint = group.card.fingerprint

    def _take_unusual(self, stream: Stream, run: TokenRun, now: float) -> int:
        """A run with repeats, faults, or more or else than tokens; returns how many new tokens were generated."""
        group = stream.group
        assert group is not None
        count, rest = divmod(len(run.tokens), TOKEN_BYTES)
        skip = stream.have - run.first
        wants = stream.logprobs is not None
        sound = rest == 0 and count > 0 and run.first >= 0
        if not sound or skip < 0 or (wants and not _are_logprobs(run.logprobs, count)):
            self._replays.run_again([stream], "gap" if sound and skip < 0 else "malformed", now)
            return 0
        if skip >= count:
            self._counters.stale_frames += 1
            return 0
        if stream.first_step < 0:
            self._begin(stream, group)
        new = min(count - skip, stream.job.max_tokens - stream.have)
        stream.output += run.tokens[skip * TOKEN_BYTES : (skip + new) * TOKEN_BYTES]
        stream.have += new
        if stream.logprobs is not None and run.logprobs is not None:
            stream.logprobs += run.logprobs[skip : skip + new]
        self._delivery.touch(stream)
        if new < count - skip:  # more than was asked for: the leader lost count, we did not
            self._lives.withdraw(stream)
            complete = self._lives.conclude(stream, now)
            assert complete
        return new if stream.job.task == GENERATE else 0

    def take_finishes(self, group: Group, finishes: Iterable[Finish], now: float) -> None:
        """Streams that a leader says are complete."""
        for finish in finishes:
            stream = group.streams.get(finish[:3])
            if stream is None:
                self._counters.stale_frames += 1
            elif finish.total != stream.have or finish.reason not in ("stop", "length"):
                self._replays.run_again([stream], "gap", now)
            else:
                self._lives.leave(stream)
                self._lives.finish(stream, finish.reason, max(0, finish.cached), now)

    def take_refusals(self, group: Group, refusals: Iterable[Refusal], now: float) -> None:
        """Streams that a leader cannot run."""
        for refusal in refusals:
            stream = group.streams.get(refusal[:3])
            if stream is None:
                self._counters.stale_frames += 1
                continue
            error = from_wire(refusal.error)
            if isinstance(error, UnavailableError):
                group.state = GroupState.DRAINING  # it wants no more; somebody else may
                self._registry.note_loss(self._registry.models[group.card.name], now)
                self._replays.run_again([stream], "draining", now, count=False)
            elif isinstance(error, OverloadedError):
                self._replays.run_again([stream], "refused", now)
            else:
                self._lives.fail(stream.job, type(error)(error.message[:2000], param=error.param), now)

    def review(self, group: Group) -> None:
        """End a probation that went well; wake suspects that wait for a settled group."""
        suspect = group.exclusive
        if suspect is not None:
            if 0 <= suspect.first_step <= group.step - suspect.probation:
                suspect.probation = 0
                group.exclusive = None
                self._lives.changed = True
        elif self._registry.models[group.card.name].queue.suspects:
            self._lives.changed = True


def _are_logprobs(value: object, count: int) -> bool:
    """Whether it is one `[logprob, [[token, logprob], ...]]` per token, small enough to pass on."""
    if type(value) is not list or len(value) != count:
        return False
    for entry in value:
        if type(entry) is not list or len(entry) != 2 or type(entry[1]) is not list or len(entry[1]) > 32:
            return False
        if not isinstance(entry[0], float | int):
            return False
        for pair in entry[1]:
            if type(pair) is not list or len(pair) != 2 or not all(isinstance(v, int | float) for v in pair):
                return False
    return True
