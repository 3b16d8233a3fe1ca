"""The lives of streams: started, cancelled, failed, finished. Keeps request table, queues and groups in step.

    start, restart ──► queued ◄──► running ──► finished
                          └──── cancel, fail ────┘

Where a stream goes next is decided in `dispatch`, what its death means in `replays`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from headrace.broker.delivery import Delivery
from headrace.broker.events import Face
from headrace.broker.groups import Group, Registry
from headrace.broker.mail import Mailer
from headrace.broker.report import Counters
from headrace.broker.requests import TOKEN_BYTES, Job, JobTable, Stream
from headrace.errors import HeadraceError
from headrace.messages import Finish, Revoke

__all__ = ["Lives"]


class Lives:
    """Moves streams between queue, group and end.

    Attributes:
        changed: whether a placement may have become possible.
    """

    def __init__(
        self, registry: Registry, jobs: JobTable, delivery: Delivery, mailer: Mailer, counters: Counters
    ) -> None:
        self._registry = registry
        self._jobs = jobs
        self._delivery = delivery
        self._mailer = mailer
        self._counters = counters
        self._revoking: dict[Group, None] = {}
        self.changed = False

    def start(self, stream: Stream, now: float) -> None:
        """Queue a stream that is new to this broker, unless its tokens show that it is complete."""
        if not self.conclude(stream, now):
            queue = self._registry.models[stream.job.model].queue
            if stream.have:
                queue.push_front([stream])
            else:
                queue.push(stream)
            self.changed = True

    def restart(self, streams: Iterable[tuple[Stream, bytes]], attempt: int, fingerprint: str, now: float) -> None:
        """The client holds more of these streams of a live job than we do: go on from there."""
        again = list(streams)
        # All ends are taken back before the first stream starts, which may be complete and would end the job.
        for stream, output in again:
            self.withdraw(stream)
            stream.adopt(output, fingerprint)
            stream.attempt = max(stream.attempt, attempt)
            stream.finish = None
        for stream, _ in again:
            self.start(stream, now)

    def cancel(self, job: Job, by: str, now: float) -> None:
        """End a live job where its client stands."""
        self._counters.cancelled[by] += 1
        for stream in job.streams:
            if not stream.ended:
                self.withdraw(stream)
                del stream.output[stream.sent * TOKEN_BYTES :]
                stream.have = stream.sent
                if stream.logprobs is not None:
                    del stream.logprobs[stream.sent - stream.base :]
                self.finish(stream, "cancelled", 0, now)

    def abandon(self, job: Job, by: str) -> None:
        """Drop a live job whose client is gone; it may submit it again with what it holds."""
        self._counters.cancelled[by] += 1
        for stream in job.streams:
            self.withdraw(stream)
        self._delivery.detach(job)
        self._jobs.forget(job)

    def fail(self, job: Job, error: HeadraceError, now: float) -> None:
        """End a live job with an error, all its choices."""
        error.request_id = job.id.hex()
        self._counters.failed[error.code] += 1
        for stream in job.streams:
            self.withdraw(stream)
        job.error = error
        self._jobs.end(job, now)
        self._delivery.fail(job)
        self._mailer.note(logging.INFO, "request failed", request=error.request_id, model=job.model, code=error.code)

    def finish(self, stream: Stream, reason: str, cached: int, now: float) -> None:
        """End a stream that is neither queued nor running well; the last one of a job ends the job."""
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

    def conclude(self, stream: Stream, now: float) -> bool:
        """Finish a stream whose tokens show that it is complete; whether they do."""
        reason = stream.conclusion()
        if reason is not None:
            self.finish(stream, reason, 0, now)
        return reason is not None

    def withdraw(self, stream: Stream) -> None:
        """Take a stream off its group, which is told at the end of the turn, or out of its queue."""
        if stream.lane is not None:
            self._registry.models[stream.job.model].queue.remove(stream)
        if (group := stream.group) is not None:
            group.revokes.append(stream.id)
            self._revoking[group] = None
            self.leave(stream)

    def leave(self, stream: Stream) -> None:
        """The group does not run the stream any more, and knows it."""
        group = stream.group
        assert group is not None
        del group.streams[stream.id]
        stream.group = None
        if group.exclusive is stream:
            group.exclusive = None
        self.changed = True

    def forget_group(self, group: Group) -> None:
        """A group is gone: there is nothing to tell it."""
        group.revokes.clear()
        self._revoking.pop(group, None)

    def flush(self) -> None:
        """Tell the leaders what to drop."""
        for group in self._revoking:
            self._mailer.send(Face.WORKERS, group.peer, Revoke(streams=tuple(group.revokes)))
            group.revokes.clear()
        self._revoking.clear()

    def validate(self) -> None:
        """Assert what must hold between events."""
        queued = {stream for model in self._registry.models.values() for stream in model.queue}
        running = {stream for group in self._registry.by_peer.values() for stream in group.streams.values()}
        for stream in self._jobs.streams():
            assert (stream in queued) + (stream in running) + stream.ended == 1
        assert all(self._jobs.live.get(stream.job.id) is stream.job for stream in queued | running)
        assert all(self._registry.by_peer.get(group.peer) is group for group in self._revoking)
