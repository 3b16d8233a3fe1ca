"""The broker without its sockets: `handle(event, now)` returns the actions that follow. No clock, no I/O, no threads.

    Submit ──► clients ──► submissions ──► lives ──► queue ──► dispatch ──► Assign
    Tokens ◄── delivery ◄───────────────── lives ◄── intake ◄── leaders ◄── Tokens
                                             ▲
                   deaths, deadlines: replays, watch

This file puts the parts together and routes events to them; each part's own file says what it does.
"""

from __future__ import annotations

import logging
import random
from typing import Any

from headrace.broker.blobs import BlobStore
from headrace.broker.clients import ClientFace
from headrace.broker.config import BrokerConfig
from headrace.broker.delivery import Delivery
from headrace.broker.dispatch import Dispatcher
from headrace.broker.events import Action, Event, Face, Malformed, PeerLost, Received, SendBlocked, Stop, Tick, TurnEnd
from headrace.broker.groups import Registry
from headrace.broker.intake import Intake
from headrace.broker.leaders import LeaderFace
from headrace.broker.lives import Lives
from headrace.broker.mail import Mailer
from headrace.broker.replays import Quarantine, Replays
from headrace.broker.report import Counters, describe_group, describe_models
from headrace.broker.requests import JobTable
from headrace.broker.room import Room
from headrace.broker.strangers import Strangers
from headrace.broker.submissions import Submissions
from headrace.broker.waiting import WaitingRoom
from headrace.broker.watch import Watch
from headrace.errors import ProtocolError, UnavailableError
from headrace.messages import PROTOCOL_VERSION, Done, Error, Message, Reset, Tokens

__all__ = ["Broker"]


class Broker:
    """The whole state of a broker."""

    def __init__(self, config: BrokerConfig | None = None, *, name: str = "broker", rng: random.Random) -> None:
        self.config = config = config or BrokerConfig()
        self.name = name
        self.counters = counters = Counters()
        self.registry = registry = Registry()
        self.jobs = jobs = JobTable(
            window=config.idempotency_window, max_ended=config.max_finished, max_ended_bytes=config.max_finished_bytes
        )
        self._mailer = mailer = Mailer()
        self._strangers = strangers = Strangers(mailer)
        self._waiting = waiting = WaitingRoom(config)
        blobs = BlobStore()
        quarantine = Quarantine(config.quarantine)
        self.delivery = delivery = Delivery(config, jobs, mailer, counters)
        self._lives = lives = Lives(registry, jobs, delivery, mailer, counters)
        self._dispatch = dispatch = Dispatcher(config, registry, lives, mailer, counters)
        replays = Replays(config, registry, lives, quarantine, mailer, counters)
        self._submissions = submissions = Submissions(
            registry,
            jobs,
            waiting,
            Room(config, registry, quarantine),
            lives=lives,
            dispatch=dispatch,
            delivery=delivery,
            mailer=mailer,
            counters=counters,
            rng=rng,
        )
        self._clients = clients = ClientFace(
            config,
            name,
            registry=registry,
            blobs=blobs,
            waiting=waiting,
            submissions=submissions,
            delivery=delivery,
            strangers=strangers,
            mailer=mailer,
            report=self.report,
        )
        self._leaders = leaders = LeaderFace(
            config,
            name,
            registry=registry,
            blobs=blobs,
            lives=lives,
            intake=Intake(registry, lives, replays, delivery, counters),
            replays=replays,
            strangers=strangers,
            mailer=mailer,
            counters=counters,
            on_ready=submissions.unpark,
        )
        self._watch = Watch(
            config,
            registry=registry,
            jobs=jobs,
            waiting=waiting,
            blobs=blobs,
            lives=lives,
            delivery=delivery,
            clients=clients,
            leaders=leaders,
            counters=counters,
        )
        self._started_at: float | None = None

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at `now` (monotonic seconds) and say what is to be done."""
        if self._started_at is None:
            self._started_at = now
        if type(event) is Received:
            if event.face is Face.WORKERS:
                self._leaders.take(event.peer, event.message, now)
            else:
                self._clients.take(event.peer, event.message, now)
        elif type(event) is TurnEnd:
            self._dispatch.flush(now)
            self._submissions.flush()
            self.delivery.flush(now)
        elif type(event) is Tick:
            self._on_tick(now)
        elif type(event) is SendBlocked:
            self._on_blocked(event)
        elif type(event) is PeerLost:
            self._on_lost(event.face, event.peer, now)
        elif type(event) is Malformed:
            self._on_malformed(event, now)
        elif type(event) is Stop:
            self._on_stop()
        return self._mailer.take()

    def report(self, now: float) -> dict[str, Any]:
        """The state for people and metrics; `headrace.broker.report` describes it."""
        return {
            "broker": self.name,
            "version": PROTOCOL_VERSION,
            "uptime_seconds": round(now - (now if self._started_at is None else self._started_at), 3),
            "models": describe_models(self.registry),
            "groups": [describe_group(group, now) for group in self.registry],
            "queue": {
                "depth": self.registry.queued,
                "tokens": sum(model.queue.tokens for model in self.registry.models.values()),
                "parked": len(self._waiting),
            },
            "clients": len(self.delivery.connections),
            "requests": {"live": len(self.jobs.live), "finished": len(self.jobs.ended)},
            "counters": self.counters.report(),
        }

    def validate(self) -> None:
        """Assert what must hold between events."""
        self.jobs.validate()
        self.registry.validate()
        self._lives.validate()
        self.delivery.validate()
        self._waiting.validate()
        self._leaders.validate()
        self._strangers.validate()
        again = sum(s.redispatches > 0 or s.attempt > 0 for m in self.registry.models.values() for s in m.queue)
        assert self.registry.queued <= 2 * self.config.max_queued_requests + again

    def _on_tick(self, now: float) -> None:
        for face, peer in self._mailer.overflowing():
            self._on_lost(face, peer, now)
        self._mailer.retry()
        self._watch.tick(now)

    def _on_malformed(self, event: Malformed, now: float) -> None:
        self.counters.malformed[event.face.value] += 1
        if self._strangers.complain(event.face, event.peer, ProtocolError(event.reason), now):
            note = {"face": event.face.value, "peer": event.peer.hex(), "reason": event.reason}
            self._mailer.note(logging.WARNING, "malformed message", **note)
        if event.face is Face.WORKERS and (group := self.registry.by_peer.get(event.peer)) is not None:
            # What it wanted to say is lost, perhaps tokens or an end: nothing it runs can be trusted to complete.
            why = "A message of this group could not be read."
            self._leaders.give_up(group, "malformed", why, now, blame=False)

    def _on_lost(self, face: Face, peer: bytes, now: float) -> None:
        self._mailer.drop(face, peer)
        if face is Face.CLIENTS:
            if (conn := self.delivery.connections.get(peer)) is not None:
                self._clients.lose(conn, now)
        elif (group := self.registry.by_peer.get(peer)) is not None:
            self._leaders.lose(group, "unreachable", now, blame=True)

    def _on_blocked(self, event: SendBlocked) -> None:
        face, peer, message = event
        keep: Message | None = message
        if face is Face.CLIENTS:
            conn = self.delivery.connections.get(peer)
            if conn is None:
                return
            # What flows is level-triggered: only its cursor moves back.
            if isinstance(message, Tokens | Done):
                self.delivery.rewind(conn, message)
                keep = None
            elif isinstance(message, Error) and self.delivery.rewind_error(conn, message.request):
                keep = None
        elif peer not in self.registry.by_peer:
            return
        self._mailer.block(face, peer, keep)

    def _on_stop(self) -> None:
        error = UnavailableError("The broker is stopping; reconnect when it is back.", retry_after=1.0)
        for peer in self.delivery.connections:
            self._mailer.send(Face.CLIENTS, peer, Error(error=error.to_wire()))
        for group in self.registry:
            self._mailer.send(Face.WORKERS, group.peer, Reset(reason="The broker is stopping."))
