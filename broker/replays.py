"""What the death of a group means for the streams aboard: run again elsewhere, run apart, or quarantined.

Laws:
    1. A stream that lost its group goes to the front of the queue with its tokens as output, so it continues.
    2. Streams that were new on a dying group are suspects. A suspect runs next to streams that proved harmless only
       (`placement.is_settled`), one suspect per group.
    3. If the group dies again meanwhile, the suspect is guilty: its content is refused for a while. The others lost
       nothing of their budget.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable

from headrace.broker.admission import quarantine_key
from headrace.broker.config import BrokerConfig
from headrace.broker.events import Face
from headrace.broker.groups import Group, Registry
from headrace.broker.lives import Lives
from headrace.broker.mail import Mailer
from headrace.broker.report import Counters
from headrace.broker.requests import Stream
from headrace.errors import WorkerCrashedError

__all__ = ["Quarantine", "Replays"]

_MAX_QUARANTINED = 1024


class Quarantine:
    """Content that took groups down lately; the oldest is forgotten first."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, key: bytes, now: float) -> None:
        """Refuse it from now on."""
        self._until[key] = now + self._seconds
        self._until.move_to_end(key)
        if len(self._until) > _MAX_QUARANTINED:
            self._until.popitem(last=False)

    def holds(self, key: bytes, now: float) -> bool:
        """Whether it is refused."""
        until = self._until.get(key)
        if until is not None and until <= now:
            del self._until[key]
            return False
        return until is not None


class Replays:
    """Second chances, counted."""

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        lives: Lives,
        quarantine: Quarantine,
        mailer: Mailer,
        counters: Counters,
    ) -> None:
        self._config = config
        self._registry = registry
        self._lives = lives
        self._quarantine = quarantine
        self._mailer = mailer
        self._counters = counters

    def run_again(self, streams: Iterable[Stream], reason: str, now: float, *, count: bool = True) -> None:
        """Streams lost their attempt: queue them in front, unless they are complete or it happened too often."""
        waiting: dict[str, list[Stream]] = {}
        for stream in streams:
            job = stream.job
            if stream.group is not None:
                self._lives.withdraw(stream)
            if stream.ended or self._lives.conclude(stream, now):
                continue
            stream.redispatches += count
            if stream.redispatches > self._config.max_redispatch:
                text = (
                    f"The request lost its worker group {stream.redispatches} times (last: {reason}); "
                    "it is given up. See the logs of the workers."
                )
                self._lives.fail(job, WorkerCrashedError(text), now)
                continue
            self._counters.redispatch[reason] += 1
            waiting.setdefault(job.model, []).append(stream)
        for model, again in waiting.items():
            # A later stream of the list may have failed the job of an earlier one.
            self._registry.models[model].queue.push_front([stream for stream in again if not stream.ended])
            self._lives.changed = True

    def lose(self, group: Group, reason: str, now: float, *, blame: bool) -> None:
        """A group is gone; what it ran goes elsewhere. `blame`: it died, and one of its streams may be why."""
        self._registry.remove(group, now)
        self._mailer.drop(Face.WORKERS, group.peer)
        streams = list(group.streams.values())
        guilty = group.exclusive if blame else None
        for stream in streams:
            if blame and guilty is None:
                self._suspect(stream, group)
            self._lives.leave(stream)
        self._lives.forget_group(group)
        text = "group lost"
        level = logging.INFO if reason == "drained" else logging.WARNING  # one that ends in good order is no news
        self._mailer.note(level, text, group=group.name, reason=reason, streams=len(streams), step=group.step)
        self.run_again((s for s in streams if s is not guilty), reason, now, count=blame and guilty is None)
        if guilty is not None and not guilty.ended and not self._lives.conclude(guilty, now):
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
        self._quarantine.add(quarantine_key(job.digest, job.max_tokens), now)
        self._counters.quarantined += 1
        message = "The request took its worker group down twice; it is refused from now on. Do not repeat it."
        self._lives.fail(job, WorkerCrashedError(message), now)
