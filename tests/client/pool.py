"""A broker in a thread with fake groups, on Unix sockets: all that a client needs to be tried with real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.broker.config import BrokerConfig
from headrace.broker.serve import BrokerServer
from headrace.card import TOKENIZER
from headrace.messages import Assignment
from tests.client.tiny import ENCODER_FILES, FILES, tiny_card
from tests.support.fake_group import Emit, FakeGroup, emit_by_seed
from tests.support.tiny_tokenizer import END_OF_TEXT

__all__ = ["Pool", "seeded", "speaking", "wait_until"]


def speaking(text: str) -> Emit:
    """Tokens that spell a text, byte by byte, and end it."""
    tokens = [*text.encode(), END_OF_TEXT]

    def emit(assignment: Assignment, index: int) -> int:
        return tokens[min(index, len(tokens) - 1)]

    return emit


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait for a condition, and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.005)
    return value


class Pool:
    """Starts and stops things; whatever still runs at the end is stopped by `close`."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/clients.sock"
        self.worker_endpoint = f"ipc://{folder}/workers.sock"
        self.groups: list[FakeGroup] = []
        self._broker: BrokerServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def broker(self) -> BrokerServer:
        """The one that runs."""
        assert self._broker is not None
        return self._broker

    def start_broker(self, **config: Any) -> BrokerServer:
        """A fresh broker on the same addresses as ever."""
        self._broker = BrokerServer(self.endpoint, self.worker_endpoint, BrokerConfig(**config))
        self._broker.bind()
        self._thread = threading.Thread(target=self._broker.run, name="broker", daemon=True)
        self._thread.start()
        return self._broker

    def stop_broker(self) -> None:
        """End it, with all it knew."""
        if self._thread is not None:
            self.broker.stop()
            self._thread.join(30)
            assert not self._thread.is_alive()
            self._thread = None

    def start_group(self, emit: Emit | None = None, **options: Any) -> FakeGroup:
        """A group of the tiny model; without `emit` it emits what the seed says."""
        options.setdefault("card", tiny_card())
        options.setdefault("name", f"group {len(self.groups)}")
        if emit is not None:
            options["emit"] = emit
        group = FakeGroup(self.worker_endpoint, blobs=FILES | {"encoder": ENCODER_FILES[TOKENIZER]}, **options).start()
        self.groups.append(group)
        wait_until(lambda: any(each["name"] == group.name and each["state"] == "ready" for each in self.report()))
        return group

    def kill(self, group: FakeGroup) -> None:
        """End a group without a word."""
        self.groups.remove(group)
        group.kill()

    def report(self) -> list[dict[str, Any]]:
        """The broker's groups, as its core describes them."""
        while True:
            try:
                groups: list[dict[str, Any]] = self.broker.core.report(time.monotonic())["groups"]
            except RuntimeError:  # a table changed its size while we looked, from another thread
                continue
            return groups

    @property
    def running(self) -> int:
        """Streams that groups work on."""
        return sum(len(group.running) for group in self.groups)

    def close(self) -> None:
        """Stop everything."""
        for group in self.groups:
            group.stop()
        self.stop_broker()


def seeded(seed: int, count: int, choice: int = 0) -> tuple[int, ...]:
    """The tokens that a group without `emit` of its own makes of a seed."""
    assignment = Assignment(request=b"", choice=choice, attempt=0, prompt=b"", sampling={"seed": seed})
    return tuple(emit_by_seed(assignment, index) for index in range(count))
