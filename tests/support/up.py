"""`headrace up` as a person starts it: a process of its own, with all that it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

from tests.support.children import LIMIT, gone, wait_until

__all__ = ["Up"]

ROOT = Path(__file__).parents[2]


class Up:
    """A running pool; as a context manager it ends everything, by force if need be.

    Attributes:
        endpoint: of the broker, for clients.
        page: URL of the chat page, once `wait_ready` returned.
    """

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hr")
        environment = os.environ | {"HEADRACE_RUNTIME_DIR": self._folder.name, "OMP_NUM_THREADS": "1"}
        self.endpoint = f"ipc://{self._folder.name}/clients.sock"
        self.page = ""
        command = [sys.executable, "-m", "headrace.scripts.main", "up", "--port", str(port), "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    def __enter__(self) -> Up:
        return self

    def __exit__(self, *_: object) -> None:
        pids = [self.process.pid, *(child.pid for child in self.children())]
        self.process.terminate()
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
        wait_until(lambda: gone(pids), "all processes of the pool end")
        self._reader.join(LIMIT)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._folder.cleanup()

    @property
    def output(self) -> str:
        """What it printed so far."""
        return "".join(self._lines)

    def wait_ready(self, limit: float = 2 * LIMIT) -> Up:
        """Wait for the ready block."""
        wait_until(lambda: self.process.poll() is not None or " try " in self.output, "the pool is ready", limit)
        found = re.search(r"chat page\s+(http://\S+)", self.output)
        assert found, self.output
        self.page = found[1]
        return self

    def wait(self, limit: float = 2 * LIMIT) -> int:
        """Wait for it to end by itself; its exit code."""
        code = self.process.wait(limit)
        self._reader.join(LIMIT)
        return code

    def children(self) -> list[psutil.Process]:
        """All processes below it."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def find(self, name: str) -> list[psutil.Process]:
        """Processes below it by the name that `ps` shows."""
        return [child for child in self.children() if name in child.name() or name in " ".join(child.cmdline())]

    def kill(self, name: str) -> None:
        """SIGKILL to the one process of that name."""
        (victim,) = self.find(name)
        victim.send_signal(signal.SIGKILL)
