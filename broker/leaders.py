"""The face towards leaders: greetings, blobs, heartbeats, farewells. Their output is taken in `intake`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from headrace.broker.blobs import BlobStore, Download
from headrace.broker.config import BrokerConfig
from headrace.broker.events import Face
from headrace.broker.groups import Group, GroupState, Registry
from headrace.broker.intake import Intake
from headrace.broker.lives import Lives
from headrace.broker.mail import Mailer
from headrace.broker.refusals import unsupported_version
from headrace.broker.replays import Replays
from headrace.broker.report import Counters
from headrace.broker.strangers import Strangers
from headrace.errors import ConfigError, HeadraceError, ProtocolError
from headrace.messages import (
    PROTOCOL_VERSION,
    Blob,
    Done,
    Drained,
    Error,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Message,
    Refused,
    Tokens,
)
from headrace.tasks import EMBED

__all__ = ["LeaderFace"]

_MAX_GAUGES = 64
_MAX_ROWS = 65536
_MAX_BLOBS = 16


class LeaderFace:
    """What the broker does when a leader speaks."""

    def __init__(
        self,
        config: BrokerConfig,
        name: str,
        *,
        registry: Registry,
        blobs: BlobStore,
        lives: Lives,
        intake: Intake,
        replays: Replays,
        strangers: Strangers,
        mailer: Mailer,
        counters: Counters,
        on_ready: Callable[[str, float], None],
    ) -> None:
        self._config = config
        self._name = name
        self._registry = registry
        self._blobs = blobs
        self._lives = lives
        self._intake = intake
        self._replays = replays
        self._strangers = strangers
        self._mailer = mailer
        self._counters = counters
        self._on_ready = on_ready
        self._downloads: dict[Group, Download] = {}
        self._handlers: dict[type, Callable[[Group, Any, float], None]] = {
            Tokens: intake.take_tokens,
            Heartbeat: self._on_heartbeat,
            Done: lambda group, message, now: intake.take_finishes(group, message.finishes, now),
            Refused: lambda group, message, now: intake.take_refusals(group, message.refusals, now),
            Drained: lambda group, message, now: self.lose(group, "drained", now, blame=False),
            Blob: self._on_blob,
        }

    def take(self, peer: bytes, message: Message, now: float) -> None:
        """A leader said something."""
        group = self._registry.by_peer.get(peer)
        if type(message) is GroupHello:
            self._on_hello(peer, message, now)
        elif group is None:
            self._counters.stale_frames += 1
            self._strangers.refer(peer, now)
        else:
            group.heard_at = now
            self._handlers[type(message)](group, message, now)

    def lose(self, group: Group, reason: str, now: float, *, blame: bool) -> None:
        """A group is gone or given up."""
        self._downloads.pop(group, None)
        self._replays.lose(group, reason, now, blame=blame)

    def give_up(self, group: Group, reason: str, why: str, now: float, *, blame: bool) -> None:
        """A group that may still be there is not trusted any more: it has to start over."""
        self.lose(group, reason, now, blame=blame)
        self._strangers.reset(group.peer, why, now)

    def ask_again(self, now: float, patience: float) -> None:
        """Repeat questions for blobs that were not answered in time."""
        for group, download in self._downloads.items():
            if now - download.asked_at > patience:
                download.asked_at = now
                self._mailer.send(Face.WORKERS, group.peer, download.next_part)

    def _on_hello(self, peer: bytes, hello: GroupHello, now: float) -> None:
        problem = _problem_with(hello)
        namesake = self._registry.by_name.get(hello.group)
        twin = namesake is not None and namesake.peer != peer and not namesake.lives_on_as(hello)
        if problem is None and twin and self._strangers.was_replaced(peer):
            problem = _name_taken(hello.group)
        if problem is not None:
            self._mailer.send(Face.WORKERS, peer, Error(error=problem.to_wire()))
            return
        if namesake is not None and namesake.peer != peer:
            # The newcomer wins: nearly always it was started because the other one is dead.
            self.lose(namesake, "replaced", now, blame=twin)
            if twin:
                self._strangers.replace(namesake.peer, now)
                self._mailer.send(Face.WORKERS, namesake.peer, Error(error=_name_taken(hello.group).to_wire()))
        present = self._registry.by_peer.get(peer)
        if present is not None:
            told = self._strangers.was_reset(peer, now)
            self.lose(present, "restarted", now, blame=not told and not present.lives_on_as(hello))
        group = Group(peer, hello, now)
        group.missing_blobs = {hash for hash in group.missing_blobs if hash not in self._blobs}
        self._registry.add(group, now)
        heartbeat_ms = int(self._config.heartbeat * 1000)
        self._mailer.send(Face.WORKERS, peer, GroupWelcome(broker=self._name, heartbeat_ms=heartbeat_ms))
        self._mailer.note(logging.INFO, "group joined", group=group.name, model=group.card.name)
        self._fetch_next(group, now)

    def _fetch_next(self, group: Group, now: float) -> None:
        """Ask the leader for a blob that is missing, or declare the group ready."""
        self._downloads.pop(group, None)
        if group.missing_blobs:
            download = self._downloads[group] = Download(min(group.missing_blobs), now)
            self._mailer.send(Face.WORKERS, group.peer, download.next_part)
            return
        self._registry.ready(group)
        self._lives.changed = True
        self._mailer.note(logging.INFO, "group ready", group=group.name, model=group.card.name)
        self._on_ready(group.card.name, now)

    def _on_blob(self, group: Group, part: Blob, now: float) -> None:
        download = self._downloads.get(group)
        if download is None:
            return
        try:
            whole = download.take(part, now)
        except ProtocolError as error:
            self._mailer.send(Face.WORKERS, group.peer, Error(error=error.to_wire()))
            self.lose(group, "bad blob", now, blame=False)
            return
        if whole is None:
            self._mailer.send(Face.WORKERS, group.peer, download.next_part)
            return
        self._blobs.add(download.hash, whole)
        for other in self._registry:
            other.missing_blobs.discard(download.hash)
            if other.state is GroupState.LOADING and (other is group or not other.missing_blobs):
                self._fetch_next(other, now)

    def _on_heartbeat(self, group: Group, beat: Heartbeat, now: float) -> None:
        group.advance(beat.step, now)
        if not beat.busy and not group.streams:
            group.step_at = now
        group.load = {k: v for k, v in list(beat.load.items())[:_MAX_GAUGES] if isinstance(v, int | float)}
        if group.load.get("draining") and group.state is GroupState.READY:
            group.state = GroupState.DRAINING
            self._registry.note_loss(self._registry.models[group.card.name], now)
        self._intake.review(group)

    def validate(self) -> None:
        """Assert what must hold between events."""
        for group in self._registry:
            assert (group in self._downloads) == (group.state is GroupState.LOADING)
        assert all(self._registry.by_peer.get(group.peer) is group for group in self._downloads)


def _name_taken(name: str) -> ConfigError:
    return ConfigError(f"Another worker group said it is {name[:100]!r}; give each its own name.", param="group")


def _problem_with(hello: GroupHello) -> HeadraceError | None:
    """Why a group cannot join."""
    card = hello.card
    if hello.version != PROTOCOL_VERSION:
        return unsupported_version("worker group", hello.version)
    if not hello.group or not card.name or card.vocab_size < 1 or card.max_model_len < 1 or hello.kv_tokens < 1:
        return ProtocolError("A group needs a name, and its card a name, a vocabulary and a context above zero.")
    if EMBED in card.tasks and card.embedding_size < 1:
        return ProtocolError("The card of a model that makes vectors says how many numbers they have.")
    if len(card.blobs) > _MAX_BLOBS or not 1 <= hello.max_num_seqs <= _MAX_ROWS:
        return ProtocolError(f"A card has at most {_MAX_BLOBS} blobs, and a group runs 1 to {_MAX_ROWS:,} streams.")
    return None
