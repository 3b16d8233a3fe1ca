"""A real gateway on a real port for each test, with a client that plays back what the test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from playwright.sync_api import sync_playwright

from headrace.gateway.serve import GatewayServer
from headrace.gateway.settings import GatewaySettings
from tests.gateway.browser import ChatPage, find_chromium, launch
from tests.gateway.helpers import WAIT
from tests.support.fake_client import FakeClient


@dataclass
class Running:
    """A gateway in a thread, and how to reach it."""

    fake: FakeClient
    server: GatewayServer
    thread: threading.Thread
    headers: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.url = self.server.url.rstrip("/")
        self.port = self.server.port
        self.http = httpx.Client(base_url=self.url, headers=self.headers, timeout=WAIT)

    def post(self, path: str, body: Any, **rest: Any) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return self.http.post(path, content=json.dumps(body), headers=headers, **rest)

    def stop(self) -> None:
        self.server.stop()

    def ended(self) -> None:
        """Wait until it has stopped."""
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


def start(
    script: Callable[..., Any] | FakeClient | None = None,
    *,
    client: Callable[[], Any] | None = None,
    **settings: Any,
) -> Running:
    """Start a gateway with what a fake client says, or with another client."""
    fake = script if isinstance(script, FakeClient) else FakeClient(script) if script else FakeClient()
    ready = threading.Event()
    settings = {"port": 0, "drain_timeout": 5.0} | settings
    server = GatewayServer(
        settings=GatewaySettings(**settings), client=client or (lambda: fake), on_ready=lambda url: ready.set()
    )
    thread = threading.Thread(target=server.run, name="gateway", daemon=True)
    thread.start()
    assert ready.wait(WAIT)
    keys = settings.get("api_keys")
    return Running(fake, server, thread, {"authorization": f"Bearer {keys[0]}".encode()} if keys else {})


def end(gateways: list[Running]) -> None:
    for each in gateways:
        each.stop()
    for each in gateways:
        each.ended()
        each.http.close()


@pytest.fixture
def serve() -> Any:
    """Starts gateways; they are stopped after the test."""
    running: list[Running] = []

    def serve(*arguments: Any, **settings: Any) -> Running:
        running.append(start(*arguments, **settings))
        return running[-1]

    yield serve
    end(running)


@pytest.fixture(scope="module")
def plain() -> Any:
    """One gateway for the many tests that only look at a single answer."""
    running = start()
    yield running
    end([running])


@pytest.fixture(scope="module")
def browser() -> Any:
    """A headless browser; Playwright's event loop stays in this thread meanwhile, so not for longer than a module."""
    if find_chromium() is None:
        pytest.skip("no Chromium or Chrome is on the path; install the package chromium")
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Any:
    """Opens the page of a gateway in a fresh profile; at the end nothing may have gone wrong in it."""
    opened: list[ChatPage] = []

    def visit(running: Running, **options: Any) -> ChatPage:
        opened.append(ChatPage(browser.new_context(**options), running.url))
        return opened[-1].open()

    yield visit
    try:
        for each in opened:
            each.check()
    finally:
        for each in opened:
            each.context.close()
