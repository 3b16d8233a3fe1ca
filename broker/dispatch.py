"""From the request table to the groups and back: placing streams, taking their output, replaying after a death.

Laws:
    1. Output counts only if it comes from the group that has the stream now, under the attempt it has now, at the next
       index. Anything else is late (dropped and counted) or a fault of that attempt (run again).
    2. A stream that lost its group goes to the front of the queue with its tokens as output, so it continues.
    3. Streams that were new on a dying group are suspects. A suspect runs next to streams that proved harmless only
       (`is_settled`), one suspect per group. If the group dies again meanwhile, it is guilty and the others are not.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from headrace.broker.admission import quarantine_key
from headrace.broker.config import BrokerConfig
from headrace.broker.delivery import Delivery
from headrace.broker.events import Face
from headrace.broker.groups import Group, GroupState, Model, Registry
from headrace.broker.mail import Mailer
from headrace.broker.placement import PrefixAffinity, choose, is_settled, may_continue
from headrace.broker.report import Counters
from headrace.broker.requests import TOKEN_BYTES, Job, JobTable, Stream
from headrace.errors import HeadraceError, OverloadedError, UnavailableError, WorkerCrashedError, from_wire
from headrace.messages import Assign, Assignment, Finish, Refusal, Revoke, TokenRun, Tokens

__all__ = ["Dispatcher"]

_ASSIGN_BYTES = 4 << 20  # of prompts in one message
_MAX_QUARANTINED = 1024


class Dispatcher:
    """All queues and what runs."""

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        jobs: JobTable,
        delivery: Delivery,
        mailer: Mailer,
        counters: Counters,
    ) -> None:
        self._config = config
        self._registry = registry
        self._jobs = jobs
        self._delivery = delivery
        self._mailer = mailer
        self._counters = counters
        self._affinity = PrefixAffinity()
        self._quarantine: OrderedDict[bytes, float] = OrderedDict()  # content -> until when
        self._revoking: dict[Group, None] = {}
        self.changed = False  # whether a placement may have become possible

    # ------------------------------------------------------------------------------------------- lives of streams

    def start(self, stream: Stream, now: float) -> None:
        """Queue a stream that is new to this broker, unless its tokens show that it is complete."""
        if not self._conclude(stream, now):
            queue = self._registry.models[stream.job.model].queue
            if stream.have:
                queue.push_front([stream])
            else:
                queue.push(stream)
            self.changed = True

    def restart(self, stream: Stream, output: bytes, attempt: int, fingerprint: str, now: float) -> None:
        """The client holds more than we do: go on from there."""
        self._withdraw(stream)
        stream.adopt(output, fingerprint)
        stream.attempt = max(stream.attempt, attempt)
        stream.finish = None
        self.start(stream, now)

    def cancel(self, job: Job, by: str, now: float) -> None:
        """End a live job where its client stands."""
        self._counters.cancelled[by] += 1
        for stream in job.streams:
            if not stream.ended:
                self._withdraw(stream)
                del stream.output[stream.sent * TOKEN_BYTES :]
                stream.have = stream.sent
                if stream.logprobs is not None:
                    del stream.logprobs[stream.sent - stream.base :]
                self._finish(stream, "cancelled", 0, now)

    def abandon(self, job: Job, by: str) -> None:
        """Drop a live job whose client is gone; it may submit it again with what it holds."""
        self._counters.cancelled[by] += 1
        for stream in job.streams:
            self._withdraw(stream)
        self._delivery.detach(job)
        self._jobs.forget(job)

    def fail(self, job: Job, error: HeadraceError, now: float) -> None:
        """End a live job with an error, all its choices."""
        error.request_id = job.id.hex()
        self._counters.failed[error.code] += 1
        for stream in job.streams:
            self._withdraw(stream)
        job.error = error
        self._jobs.end(job, now)
        self._delivery.fail(job)
        self._mailer.note(logging.INFO, "request failed", request=error.request_id, model=job.model, code=error.code)

    def quarantined(self, key: bytes, now: float) -> bool:
        """Whether content like this took groups down lately."""
        until = self._quarantine.get(key)
        if until is not None and until <= now:
            del self._quarantine[key]
            return False
        return until is not None

    def _finish(self, stream: Stream, reason: str, cached: int, now: float) -> None:
        job = stream.job
        stream.finish = Finish(job.id, stream.choice, stream.attempt, reason, stream.have, cached)
        self._delivery.touch(stream)
        self._counters.finished[reason] += 1
        if all(s.finish is not None for s in job.streams):
            self._delivery.orphans.pop(job, None)
            self._jobs.end(job, now)
            self._mailer.note(
                logging.INFO,
                "request finished",
                request=job.id.hex(),
                model=job.model,
                reason=reason,
                prompt_tokens=job.prompt_tokens,
                tokens=sum(s.have for s in job.streams),
                seconds=round(now - job.created_at, 3),
            )

    def _conclude(self, stream: Stream, now: float) -> bool:
        reason = stream.conclusion()
        if reason is not None:
            self._finish(stream, reason, 0, now)
        return reason is not None

    def _withdraw(self, stream: Stream) -> None:
        """Take a stream off its group or out of its queue."""
        if stream.lane is not None:
            self._registry.models[stream.job.model].queue.remove(stream)
        if (group := stream.group) is not None:
            group.revokes.append(stream.id)
            self._revoking[group] = None
            self._leave(stream)

    def _leave(self, stream: Stream) -> None:
        group = stream.group
        assert group is not None
        del group.streams[stream.id]
        stream.group = None
        if group.exclusive is stream:
            group.exclusive = None
        self.changed = True

    # -------------------------------------------------------------------------------------------------- placing

    def flush(self, now: float) -> None:
        """Place what can be placed and tell the leaders; called when the sockets are drained."""
        for group in self._revoking:
            if self._registry.by_peer.get(group.peer) is group:
                self._mailer.send(Face.WORKERS, group.peer, Revoke(streams=tuple(group.revokes)))
            group.revokes.clear()
        self._revoking.clear()
        if self.changed:
            self.changed = False
            for model in self._registry.models.values():
                if model.queue and (ready := model.ready):
                    self._place(model, ready, now)

    def _place(self, model: Model, ready: list[Group], now: float) -> None:
        placed: dict[Group, list[Stream]] = {}
        reserved = self._place_suspects(model, ready, placed, now)
        open_groups = [group for group in ready if group.free_rows > 0 and group not in reserved]
        skipped: list[Stream] = []
        while open_groups and (stream := model.queue.pop()) is not None:
            group = choose(stream, open_groups, self._affinity)
            if group is None:
                skipped.append(stream)
                continue
            self._assign(stream, group, now)
            placed.setdefault(group, []).append(stream)
            if group.free_rows <= 0:
                open_groups.remove(group)
        model.queue.push_front(skipped)
        for group, streams in placed.items():
            self._send_assignments(group, streams, now)

    def _place_suspects(
        self, model: Model, ready: list[Group], placed: dict[Group, list[Stream]], now: float
    ) -> set[Group]:
        """Place one suspect per group; returns groups kept free of newcomers so that a suspect can have them soon."""
        reserved: set[Group] = set()
        for stream in list(model.queue.suspects):
            hosts = [g for g in ready if g.exclusive is None and g not in reserved and may_continue(stream, g)]
            if not hosts:
                continue
            host = min(hosts, key=lambda g: (not is_settled(g, self._config.suspect_steps), len(g.streams)))
            if host.free_rows > 0 and is_settled(host, self._config.suspect_steps):
                model.queue.remove(stream)
                self._assign(stream, host, now)
                host.exclusive = stream
                placed.setdefault(host, []).append(stream)
            else:
                reserved.add(host)
        return reserved

    def _assign(self, stream: Stream, group: Group, now: float) -> None:
        hint = group.hints.pop((stream.job.id, stream.choice), 0)
        stream.attempt = max(stream.attempt, hint) + 1
        stream.group = group
        stream.first_step = -1
        if not group.streams:
            group.step_at = now
        group.streams[stream.id] = stream
        self._counters.resumed_tokens += stream.have
        self._affinity.remember(stream, group)

    def _send_assignments(self, group: Group, streams: Sequence[Stream], now: float) -> None:
        batch: list[Assignment] = []
        size = 0
        for stream in streams:
            job = stream.job
            batch.append(
                Assignment(
                    request=job.id,
                    choice=stream.choice,
                    attempt=stream.attempt,
                    prompt=job.prompt,
                    output=bytes(stream.output),
                    sampling=job.sampling,
                    budget_ms=None if job.deadline is None else max(1, int((job.deadline - now) * 1000)),
                )
            )
            size += len(job.prompt) + len(stream.output)
            if size > _ASSIGN_BYTES:
                self._mailer.send(Face.WORKERS, group.peer, Assign(assignments=tuple(batch)))
                batch, size = [], 0
        if batch:
            self._mailer.send(Face.WORKERS, group.peer, Assign(assignments=tuple(batch)))

    # --------------------------------------------------------------------------------------------- leaders' output

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
            if not plain or job.weight != TOKEN_BYTES or run[5] is not None:
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
        """A run with repeats, log probabilities or faults; returns how many tokens of it were new."""
        group = stream.group
        assert group is not None
        count, rest = divmod(len(run.tokens), TOKEN_BYTES)
        skip = stream.have - run.first
        wants = stream.logprobs is not None
        sound = rest == 0 and count > 0 and run.first >= 0
        if not sound or skip < 0 or (wants and not _are_logprobs(run.logprobs, count)):
            self.run_again([stream], "gap" if sound and skip < 0 else "malformed", now)
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
            self._withdraw(stream)
            self._finish(stream, "length", 0, now)
        return new

    def take_finishes(self, group: Group, finishes: Iterable[Finish], now: float) -> None:
        """Streams that a leader says are complete."""
        for finish in finishes:
            stream = group.streams.get(finish[:3])
            if stream is None:
                self._counters.stale_frames += 1
            elif finish.total != stream.have or finish.reason not in ("stop", "length"):
                self.run_again([stream], "gap", now)
            else:
                self._leave(stream)
                self._finish(stream, finish.reason, max(0, finish.cached), now)

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
                self.run_again([stream], "draining", now, count=False)
            elif isinstance(error, OverloadedError):
                self.run_again([stream], "refused", now)
            else:
                self.fail(stream.job, type(error)(error.message[:2000], param=error.param), now)

    def review(self, group: Group) -> None:
        """End a probation that went well; wake suspects that wait for a settled group."""
        suspect = group.exclusive
        if suspect is not None:
            if 0 <= suspect.first_step <= group.step - suspect.probation:
                suspect.probation = 0
                group.exclusive = None
                self.changed = True
        elif self._registry.models[group.card.name].queue.suspects:
            self.changed = True

    # ------------------------------------------------------------------------------------------------- replays

    def run_again(self, streams: Iterable[Stream], reason: str, now: float, *, count: bool = True) -> None:
        """Streams lost their attempt: queue them in front, unless they are complete or it happened too often."""
        waiting: dict[str, list[Stream]] = {}
        for stream in streams:
            job = stream.job
            if stream.group is not None:
                self._withdraw(stream)
            if stream.ended or self._conclude(stream, now):
                continue
            stream.redispatches += count
            if stream.redispatches > self._config.max_redispatch:
                self.fail(
                    job,
                    WorkerCrashedError(
                        f"The request lost its worker group {stream.redispatches} times (last: {reason}); "
                        "it is given up. See the logs of the workers."
                    ),
                    now,
                )
                continue
            self._counters.redispatch[reason] += 1
            waiting.setdefault(job.model, []).append(stream)
        for model, again in waiting.items():
            # A later stream of the list may have failed the job of an earlier one.
            self._registry.models[model].queue.push_front([stream for stream in again if not stream.ended])
            self.changed = True

    def lose(self, group: Group, reason: str, now: float, *, blame: bool) -> None:
        """A group is gone; what it ran goes elsewhere. `blame`: it died, and one of its streams may be why."""
        self._registry.remove(group, now)
        self._mailer.drop(Face.WORKERS, group.peer)
        streams = list(group.streams.values())
        guilty = group.exclusive if blame else None
        for stream in streams:
            if blame and guilty is None:
                self._suspect(stream, group)
            self._leave(stream)
        self._revoking.pop(group, None)
        text = "group lost"
        self._mailer.note(logging.WARNING, text, group=group.name, reason=reason, streams=len(streams), step=group.step)
        self.run_again((s for s in streams if s is not guilty), reason, now, count=blame and guilty is None)
        if guilty is not None and not guilty.ended and not self._conclude(guilty, now):
            self._condemn(guilty, now)

    def _suspect(self, stream: Stream, group: Group) -> None:
        stream.marks += 1
        steps = self._config.suspect_steps
        if stream.first_step < 0 or group.step - stream.first_step < steps:
            stream.probation = max(stream.probation, steps)
        if stream.marks >= 2:
            stream.probation = max(stream.probation, self._config.long_probation_steps)

    def _condemn(self, stream: Stream, now: float) -> None:
        job = stream.job
        self._quarantine[quarantine_key(job.digest, job.max_tokens)] = now + self._config.quarantine
        if len(self._quarantine) > _MAX_QUARANTINED:
            self._quarantine.popitem(last=False)
        self._counters.quarantined += 1
        message = "The request took its worker group down twice; it is refused from now on. Do not repeat it."
        self.fail(job, WorkerCrashedError(message), now)

    def validate(self) -> None:
        """Assert what must hold between events."""
        queued = {stream for model in self._registry.models.values() for stream in model.queue}
        running = {stream for group in self._registry.by_peer.values() for stream in group.streams.values()}
        for stream in self._jobs.streams():
            assert (stream in queued) + (stream in running) + stream.ended == 1
        assert all(self._jobs.live.get(stream.job.id) is stream.job for stream in queued | running)
        assert len(self._quarantine) <= _MAX_QUARANTINED


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
