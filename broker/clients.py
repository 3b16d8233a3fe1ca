"""The face towards clients: greetings, and who answers what. See `submissions` for requests, `delivery` for answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.broker.blobs import BlobStore
from headrace.broker.config import BrokerConfig
from headrace.broker.delivery import Connection, Delivery
from headrace.broker.events import Face
from headrace.broker.groups import Registry
from headrace.broker.mail import Mailer
from headrace.broker.refusals import unsupported_version
from headrace.broker.strangers import Strangers
from headrace.broker.submissions import Submissions
from headrace.broker.waiting import WaitingRoom
from headrace.errors import HeadraceError, OverloadedError, ProtocolError
from headrace.messages import (
    PROTOCOL_VERSION,
    Attach,
    Cancel,
    Cards,
    Credit,
    Describe,
    Error,
    GetBlob,
    GetStatus,
    Hello,
    Message,
    Ping,
    Pong,
    Status,
    Submit,
    Welcome,
)
from headrace.sampling import MAX_N

__all__ = ["ClientFace"]


class ClientFace:
    """What the broker does when a client speaks."""

    def __init__(
        self,
        config: BrokerConfig,
        name: str,
        *,
        registry: Registry,
        blobs: BlobStore,
        waiting: WaitingRoom,
        submissions: Submissions,
        delivery: Delivery,
        strangers: Strangers,
        mailer: Mailer,
        report: Callable[[float], dict[str, Any]],
    ) -> None:
        self._config = config
        self._name = name
        self._registry = registry
        self._blobs = blobs
        self._waiting = waiting
        self._delivery = delivery
        self._strangers = strangers
        self._mailer = mailer
        self._handlers: dict[type, Callable[[Connection, Any, float], None]] = {
            Submit: submissions.take,
            Cancel: submissions.cancel,
            Credit: lambda conn, message, now: delivery.acknowledge(conn, message.acks, now),
            Attach: self._on_attach,
            Describe: lambda conn, message, now: self._tell(conn, Cards(cards=registry.cards())),
            GetBlob: self._on_get_blob,
            Ping: lambda conn, message, now: self._tell(conn, Pong(nonce=message.nonce)),
            GetStatus: lambda conn, message, now: self._tell(conn, Status(report=report(now))),
        }

    def take(self, peer: bytes, message: Message, now: float) -> None:
        """A client said something."""
        conn = self._delivery.connections.get(peer)
        if type(message) is Hello:
            self._on_hello(peer, message, now)
        elif conn is None:
            error = ProtocolError("Say Hello first; the broker may have been restarted.")
            self._strangers.complain(Face.CLIENTS, peer, error, now)
        else:
            conn.heard_at = now
            self._handlers[type(message)](conn, message, now)

    def lose(self, conn: Connection, now: float) -> None:
        """A client is gone."""
        self._delivery.disconnect(conn, now)
        self._waiting.forget(conn.peer)

    def _tell(self, conn: Connection, message: Message) -> None:
        self._mailer.send(Face.CLIENTS, conn.peer, message)

    def _on_hello(self, peer: bytes, hello: Hello, now: float) -> None:
        if hello.version != PROTOCOL_VERSION:
            error = unsupported_version("client", hello.version)
            self._mailer.send(Face.CLIENTS, peer, Error(error=error.to_wire()))
            return
        conn = self._delivery.connect(peer, now)
        if len(self._delivery.connections) > self._config.max_clients and not self._make_room(conn, now):
            text = f"The broker already serves {self._config.max_clients} clients; close some, or try again later."
            self._mailer.send(Face.CLIENTS, peer, Error(error=OverloadedError(text, retry_after=5.0).to_wire()))
            return
        limits = {
            "window_bytes": self._config.window_bytes,
            "max_n": MAX_N,
            "ack_tokens": 64,
            "ack_ms": 250,
            "silence_ms": int(self._config.client_silence * 1000),
            "grace_ms": int(self._config.client_grace * 1000),
            "max_queued_requests": self._config.max_queued_requests,
        }
        self._tell(conn, Welcome(broker=self._name, cards=self._registry.cards(), limits=limits))

    def _make_room(self, newcomer: Connection, now: float) -> bool:
        """Forget the client that was silent longest and has nothing running; False if that is the newcomer itself."""
        idle = [conn for conn in self._delivery.connections.values() if not conn.jobs and conn is not newcomer]
        victim = min(idle, key=lambda conn: conn.heard_at, default=newcomer)
        self.lose(victim, now)
        return victim is not newcomer

    def _on_attach(self, conn: Connection, message: Attach, now: float) -> None:
        self._delivery.refuse_unknown(conn, self._delivery.attach(conn, message.positions, now))

    def _on_get_blob(self, conn: Connection, message: GetBlob, now: float) -> None:
        try:
            self._tell(conn, self._blobs.part(message))
        except HeadraceError as error:
            self._tell(conn, Error(error=error.to_wire()))
