"""Runs the gateway: checks its settings, takes the port, serves until it is told to stop, then finishes what runs.

A signal drains: `/ready` says no, new work is refused with 503, what runs gets `drain_timeout` seconds, and `run`
returns. The same signal again ends it at once, and shows in the exit code.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn

from headrace.addresses import is_loopback
from headrace.errors import AddressError
from headrace.gateway.app import create_app
from headrace.gateway.protocol import protocol
from headrace.gateway.settings import GatewaySettings
from headrace.gateway.state import Gateway

__all__ = ["GatewayServer", "serve"]

log = logging.getLogger("headrace.gateway")

_THREADS = 64
_LAST_WORDS = 2  # seconds for answers that were cut at the end of the drain to be sent


def serve(
    endpoint: str | None = None,
    settings: GatewaySettings | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        endpoint: of the broker; None for the usual one.
        settings: of the gateway.
        on_ready: called with the page's URL once requests are taken.

    Raises:
        AddressError: the port is in use, or the address would expose the gateway without a key.
    """
    GatewayServer(endpoint, settings, on_ready=on_ready).run()


class GatewayServer:
    """A gateway with its port taken already, so that `url` is known and errors come before anything runs.

    Args:
        endpoint: of the broker; None for the usual one.
        settings: of the gateway.
        client: makes the client of the broker; another one can be put in for tests.
        on_ready: called with the page's URL once requests are taken.

    Raises:
        AddressError: the port is in use, or the address would expose the gateway without a key.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        settings: GatewaySettings | None = None,
        *,
        client: Callable[[], Any] | None = None,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings or GatewaySettings()
        self._make_client = client or (lambda: _client(endpoint))
        self._on_ready = on_ready
        self._server: _Server | None = None
        self._stopping = threading.Event()
        self._socket = _listen(self.settings)
        self.port: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        """Where the page is."""
        host = self.settings.host
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host  # noqa: S104
        return f"http://{shown}:{self.port}/"

    def run(self) -> None:
        """Serve until `stop` is called, or a signal comes if this is the main thread."""
        try:
            asyncio.run(self._main())
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Stop taking requests, finish those in work, then let `run` return; from any thread."""
        self._stopping.set()
        if self._server is not None:
            self._server.should_exit = True

    async def _main(self) -> None:
        # The client library waits in threads while the broker does not answer; as few as there are processors by
        # default would let such requests hold up all others.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "gateway"))
        client = self._make_client()
        try:
            app = create_app(client, self.settings)
            config = uvicorn.Config(
                app,
                http=protocol(self.settings.header_timeout),  # h11: httptools takes headers of any size into memory
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # Headers up to our own limit get our own answer; beyond twice of it the parser gives up.
                h11_max_incomplete_event_size=2 * self.settings.max_headers,
                limit_concurrency=4 * self.settings.max_requests,
                timeout_graceful_shutdown=_LAST_WORDS,
                timeout_keep_alive=30,
            )
            self._server = _Server(config, app.state.gateway, started=self._started)
            if self._stopping.is_set():
                self._server.should_exit = True
            await self._server.serve(sockets=[self._socket])
        finally:
            await client.close()

    def _started(self) -> None:
        if self._on_ready is not None:
            self._on_ready(self.url)


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it listens, and drains before it closes the port."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, *, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = started
        self._gateway = gateway

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish while probes still get their answer, then close; what is left ends with an error."""
        gateway = self._gateway
        gateway.draining = True
        log.info("draining: %d requests in work", gateway.in_work)
        try:
            async with asyncio.timeout(gateway.settings.drain_timeout):
                while gateway.in_work and not self.force_exit:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            log.warning("%d requests were cut after the drain", gateway.in_work)
        # Readers of what still runs get the client's error, instead of a stream that just stops.
        await gateway.client.close()
        await super().shutdown(sockets)
        if not self.force_exit:
            self._captured_signals.clear()  # uvicorn would raise them again, and the process end as if it were killed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; at the same signal again end at once, and by that signal."""
        # Not at another one: Ctrl-C reaches a whole terminal, and a parent then adds its own SIGTERM.
        self.force_exit = self.force_exit or sig in self._captured_signals
        self._captured_signals.append(sig)
        self.should_exit = True


def _client(endpoint: str | None) -> Any:
    from headrace.client import AsyncClient

    # Whoever calls over HTTP is told whether to repeat a request; trying again here too would multiply the tries.
    return AsyncClient(endpoint, retries=0)


def _listen(settings: GatewaySettings) -> socket.socket:
    host, port = settings.host, settings.port
    if not 0 <= port <= 65535:
        raise AddressError(f"Port {port} does not exist; give --port a number from 1 to 65535.", param="port")
    if not is_loopback(host) and not settings.api_keys:
        raise AddressError(
            f"Listening on {host} would let anyone who can reach this machine use the gateway. Give --api-key, or stay "
            "on 127.0.0.1 and reach it through an SSH tunnel.",
            param="host",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"Port {port} on {host} is in use by another program. Stop that one, or choose another port with "
                "--port (0 takes a free one).",
                param="port",
            ) from error
        if error.errno == errno.EACCES:
            raise AddressError(
                f"Port {port} is not open to ordinary users; choose one from 1024 with --port.", param="port"
            ) from error
        raise AddressError(
            f"The gateway cannot listen on {host}:{port}: {error.strerror or error}. Check --host and --port.",
            param="host",
        ) from error
    return listener
