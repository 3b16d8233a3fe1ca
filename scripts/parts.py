"""What runs in the children of `headrace up` and `headrace workers`: the broker, the gateway, and getting the model.

Each says `ready` to its parent; errors cross by themselves (see headrace.processes). Heavy imports stay inside.
"""

from __future__ import annotations

import signal
import time
from typing import Any

from headrace.processes import parent

__all__ = ["run_broker", "run_fetch", "run_gateway"]

_REPORT_EVERY = 0.1  # seconds between two messages of progress


def run_broker(client_endpoint: str, worker_endpoint: str, awake: float = 0.0) -> None:
    """The broker, until SIGTERM; see `BrokerServer` for its arguments."""
    from headrace.broker.serve import BrokerServer

    server = BrokerServer(client_endpoint, worker_endpoint, awake=awake)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    with server:
        _ready(endpoint=server.client_endpoint, worker_endpoint=server.worker_endpoint)
        server.run()


def run_gateway(endpoint: str, settings: dict[str, Any]) -> None:
    """The gateway, until SIGTERM; then it finishes what runs."""
    from headrace.gateway.serve import GatewayServer
    from headrace.gateway.settings import GatewaySettings

    # uvicorn would hear a Ctrl-C too; it reaches all processes of a terminal, and the parent decides what it means.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    server = GatewayServer(endpoint, GatewaySettings(**settings), on_ready=lambda url: _ready(url=url))
    # For the time before uvicorn takes the signal over, and after it gave it back.
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.run()


def run_fetch(model: str | None, name: str | None) -> None:
    """Get the model: `progress` messages, then `ready` with its folder and the name it is served under."""
    from headrace.workers.models import model_name, resolve

    folder = resolve(model, progress=_Report())
    _ready(folder=str(folder), name=name or model_name(model, folder))


class _Report:
    """Passes progress on, but not a hundred times a second."""

    def __init__(self) -> None:
        self._phase = ""
        self._at = 0.0

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase == self._phase and done != total and now - self._at < _REPORT_EVERY:
            return
        self._phase, self._at = phase, now
        link = parent()
        assert link is not None
        link.send("progress", phase=phase, done=done, total=total)


def _ready(**fields: Any) -> None:
    link = parent()
    assert link is not None
    link.ready(**fields)
