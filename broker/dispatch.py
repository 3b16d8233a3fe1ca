"""From the queues to the groups: who runs next, and the messages that say so. Suspects are placed apart."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.broker.config import BrokerConfig
from headrace.broker.events import Face
from headrace.broker.groups import Group, Model, Registry
from headrace.broker.lives import Lives
from headrace.broker.mail import Mailer
from headrace.broker.placement import PrefixAffinity, can_run, choose, is_settled
from headrace.broker.refusals import too_late
from headrace.broker.report import Counters
from headrace.broker.requests import Stream
from headrace.messages import Assign, Assignment

__all__ = ["Dispatcher"]

# One message's worth of assignments: prompts and outputs as they are, the rest by what it costs the codec's limits.
_ASSIGN_BYTES = 4 << 20
_ASSIGNMENT_BYTES = 1024
_BIAS_BYTES = 64


class Dispatcher:
    """Places the queued streams."""

    def __init__(
        self, config: BrokerConfig, registry: Registry, lives: Lives, mailer: Mailer, counters: Counters
    ) -> None:
        self._config = config
        self._registry = registry
        self._lives = lives
        self._mailer = mailer
        self._counters = counters
        self._affinity = PrefixAffinity()

    def flush(self, now: float) -> None:
        """Place what can be placed and tell the leaders; called when the sockets are drained."""
        self._lives.flush()
        if self._lives.changed:
            self._lives.changed = False
            for model in self._registry.models.values():
                if model.queue and (ready := model.ready):
                    self._place(model, ready, now)

    def _place(self, model: Model, ready: list[Group], now: float) -> None:
        placed: dict[Group, list[Stream]] = {}
        reserved = self._place_suspects(model, ready, placed, now)
        open_groups = [group for group in ready if group.free_rows > 0 and group not in reserved]
        skipped: list[Stream] = []
        while open_groups and (stream := model.queue.pop()) is not None:
            if self._is_late(stream, now):
                continue
            group = choose(stream, open_groups, self._affinity)
            if group is None:
                skipped.append(stream)
                continue
            self._assign(stream, group, now)
            placed.setdefault(group, []).append(stream)
            if group.free_rows <= 0:
                open_groups.remove(group)
        model.queue.put_back(skipped)
        for group, streams in placed.items():
            self._send_assignments(group, streams, now)

    def _place_suspects(
        self, model: Model, ready: list[Group], placed: dict[Group, list[Stream]], now: float
    ) -> set[Group]:
        """Place one suspect per group; returns groups kept free of newcomers so that a suspect can have them soon."""
        reserved: set[Group] = set()
        for stream in list(model.queue.suspects):
            hosts = [g for g in ready if g.exclusive is None and g not in reserved and can_run(stream, g)]
            if not hosts or stream.lane is None or self._is_late(stream, now):
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

    def _is_late(self, stream: Stream, now: float) -> bool:
        """Whether its time is over: it fails, before the next tick would see it, so that no row is spent on it."""
        deadline = stream.job.deadline
        late = deadline is not None and deadline <= now
        if late:
            self._lives.fail(stream.job, too_late(), now)
        return late

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
            weight = len(job.prompt) + len(stream.output) + _ASSIGNMENT_BYTES
            weight += _BIAS_BYTES * len(job.sampling.get("logit_bias", ()))
            if batch and size + weight > _ASSIGN_BYTES:
                self._mailer.send(Face.WORKERS, group.peer, Assign(assignments=tuple(batch)))
                batch, size = [], 0
            size += weight
            batch.append(
                Assignment(
                    request=job.id,
                    choice=stream.choice,
                    attempt=stream.attempt,
                    prompt=job.prompt,
                    output=bytes(stream.output),
                    sampling=job.sampling,
                    task=job.task,
                    pooling=job.pooling,
                    budget_ms=None if job.deadline is None else max(1, int((job.deadline - now) * 1000)),
                )
            )
        if batch:
            self._mailer.send(Face.WORKERS, group.peer, Assign(assignments=tuple(batch)))
