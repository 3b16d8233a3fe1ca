"""What only the passing of time reveals: silence, standstill, deadlines, stalled readers, hopeless waits."""

from __future__ import annotations

from headrace.broker.blobs import BlobStore
from headrace.broker.clients import ClientFace
from headrace.broker.config import BrokerConfig
from headrace.broker.delivery import Delivery
from headrace.broker.groups import Model, Registry
from headrace.broker.leaders import LeaderFace
from headrace.broker.lives import Lives
from headrace.broker.refusals import model_changed, too_late, unavailable
from headrace.broker.report import Counters
from headrace.broker.requests import JobTable
from headrace.broker.waiting import WaitingRoom
from headrace.errors import SlowConsumerError

__all__ = ["Watch"]

_BLOB_PATIENCE = 5.0
_STALLED_TICK = 1.0  # a longer gap between ticks was our own pause, not the peers' silence


class Watch:
    """Looks at all clocks, several times a second."""

    def __init__(
        self,
        config: BrokerConfig,
        *,
        registry: Registry,
        jobs: JobTable,
        waiting: WaitingRoom,
        blobs: BlobStore,
        lives: Lives,
        delivery: Delivery,
        clients: ClientFace,
        leaders: LeaderFace,
        counters: Counters,
    ) -> None:
        self._config = config
        self._registry = registry
        self._jobs = jobs
        self._waiting = waiting
        self._blobs = blobs
        self._lives = lives
        self._delivery = delivery
        self._clients = clients
        self._leaders = leaders
        self._counters = counters
        self._ticked_at: float | None = None

    def tick(self, now: float) -> None:
        """Act on everything that is due."""
        self._forgive_pause(now)
        self._watch_groups(now)
        self._watch_clients(now)
        self._watch_jobs(now)
        for model in self._registry.models.values():
            if model.queue:
                self._watch_queue(model, now)
        self._jobs.expire(now)
        self._registry.forget_models(now, self._config.model_memory)
        cards = [m.card for m in self._registry.models.values()] + [g.card for g in self._registry]
        self._blobs.keep_only(hash for card in cards for hash in card.blobs.values())

    def _forgive_pause(self, now: float) -> None:
        """After a pause of our own (stopped, swapped out) nobody else was silent."""
        gap = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        if gap > _STALLED_TICK:
            self._delivery.forgive(gap, now)
            for group in self._registry:
                group.heard_at = min(now, group.heard_at + gap)
                group.step_at = min(now, group.step_at + gap)

    def _watch_groups(self, now: float) -> None:
        silence = self._config.heartbeat * self._config.missed_heartbeats
        for group in self._registry:
            if now - group.heard_at > silence:
                self._leaders.give_up(group, "silent", "The group was silent for too long.", now, blame=True)
            elif group.streams and now - group.step_at > self._config.progress_timeout:
                # Whether it says it is busy or not: it was handed streams and makes no step.
                self._leaders.give_up(group, "hung", "The group made no step for too long.", now, blame=True)
        self._leaders.ask_again(now, _BLOB_PATIENCE)

    def _watch_clients(self, now: float) -> None:
        for conn in list(self._delivery.connections.values()):
            limit = self._config.client_silence if conn.jobs else self._config.idle_client_timeout
            if now - conn.heard_at > limit:
                self._clients.lose(conn, now)
        for job, since in list(self._delivery.orphans.items()):
            if now - since > self._config.client_grace:
                self._lives.abandon(job, "disconnect")
        for peer, id, error in self._waiting.expire(now):
            if (conn_or_none := self._delivery.connections.get(peer)) is not None:
                self._delivery.refuse(conn_or_none, id, error)

    def _watch_jobs(self, now: float) -> None:
        for job in [job for job in self._jobs.live.values() if job.deadline is not None and job.deadline <= now]:
            self._lives.fail(job, too_late(), now)
        for job in self._delivery.stalled_jobs(now):
            text = f"The reader confirmed no token for {self._config.stall_timeout:.0f} s, so the stream was ended."
            self._counters.cancelled["slow_consumer"] += 1
            if not job.ended:
                self._lives.fail(job, SlowConsumerError(text), now)
                continue
            conn, told_all = job.client, all(stream.done_sent for stream in job.streams)
            self._delivery.detach(job)
            if conn is not None and not told_all:  # the answer stays; the reader may come back for it
                self._delivery.tell(conn, job.id, SlowConsumerError(text))

    def _watch_queue(self, model: Model, now: float) -> None:
        """End what no group will run."""
        if model.lost_at is not None:
            if now - model.lost_at > self._config.unavailable_after:
                for job in {stream.job: None for stream in model.queue}:
                    self._lives.fail(job, unavailable(model.card.name), now)
            return
        context: dict[str, int] = {"": model.context}  # by fingerprint; a stream without tokens may go anywhere
        for group in model.groups:
            context[group.card.fingerprint] = max(group.context, context.get(group.card.fingerprint, 0))
        for stream in list(model.queue):
            if stream.ended:
                continue  # another choice of its job took it along
            if stream.fingerprint not in context:
                self._lives.fail(stream.job, model_changed(model.card.name), now)
            elif stream.job.context > context[stream.fingerprint]:
                self._lives.fail(stream.job, unavailable(model.card.name), now)
