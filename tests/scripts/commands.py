"""`headrace ...` in a process of its own, watched from outside: its lines, its exit code, its children."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from headrace.processes import describe_exit
from tests.support.children import LIMIT, gone, wait_until
from tests.support.fake_engine import ENGINE
from tests.support.tiny_tokenizer import tiny_tokenizer_json

__all__ = ["ROOT", "Pty", "Run", "call_as_curl", "environment", "fake_model"]

ROOT = Path(__file__).parent.parent.parent


def fake_model(folder: Path, **behaviour: Any) -> Path:
    """A folder that passes for a model, to be loaded by the fake engine; `behaviour` is that of fake.json."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer_json())
    (folder / "fake.json").write_text(json.dumps(behaviour))
    return folder


def environment(runtime: Path, **more: str) -> dict[str, str]:
    """A user's environment, with a runtime folder of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "NO_COLOR"))}
    own = {name: os.environ[name] for name in ("HEADRACE_CACHE", "HEADRACE_MODELS") if name in os.environ}
    return kept | own | {"HEADRACE_RUNTIME_DIR": str(runtime), "OMP_NUM_THREADS": "1", **more}


def call_as_curl(line: str) -> Any:
    """The JSON that a curl command line gets; without curl, which not every machine has."""
    words = iter(shlex.split(line))
    assert next(words) == "curl"
    url, headers, data = next(words), {}, ""
    for word in words:
        if word == "-H":
            name, _, value = next(words).partition(": ")
            headers[name] = value
        else:
            assert word == "-d", word
            data = next(words)
    with urllib.request.urlopen(urllib.request.Request(url, data.encode(), headers), timeout=LIMIT) as answer:
        return json.load(answer)


class Run:
    """One command that runs; as a context manager it leaves nothing behind.

    Attributes:
        out: lines of stdout so far; `err` those of stderr.
    """

    def __init__(self, runtime: Path, *arguments: str | Path, fake: bool = False, **settings: Any) -> None:
        command = [sys.executable, "-m", "headrace.scripts.main", *map(str, arguments)]
        if fake:
            command += ["--engine", ENGINE]
        settings = {"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL} | settings
        env = environment(runtime, **settings.pop("env", {}))
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, cwd=ROOT, env=env, text=True, errors="replace", **settings
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        with stream:
            lines.extend(iter(stream.readline, ""))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        family = self.family()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT)
        for reader in self._readers:
            reader.join(LIMIT)
        wait_until(lambda: gone(family), "children end with the command")

    @property
    def text(self) -> str:
        """All that it wrote."""
        return "".join(self.out + self.err)

    def family(self) -> list[int]:
        """Its process id and those of its descendants."""
        try:
            return [self.process.pid, *(c.pid for c in psutil.Process(self.process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return [self.process.pid]

    def child(self, name: str) -> psutil.Process | None:
        """The descendant that calls itself so, in `ps` and `top`."""
        for pid in self.family()[1:]:
            try:
                if (process := psutil.Process(pid)).name() == name[:15]:
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def wait_for(self, text: str) -> Run:
        """Wait until it has written a text."""

        def written() -> bool:
            assert self.process.poll() is None or text in self.text, (
                f"{text!r} never came; the command {describe_exit(self.process.returncode)}:\n{self.text}"
            )
            return text in self.text

        wait_until(written, f"{text!r} in:\n{self.text}")
        return self

    def value(self, name: str) -> str:
        """What the line that begins with a name goes on with."""
        self.wait_for(f"  {name} ")
        [line] = [line for line in self.out + self.err if line.startswith(f"  {name} ")]
        return line.removeprefix(f"  {name} ").strip()

    def send(self, number: signal.Signals) -> None:
        """A signal to the command alone."""
        self.process.send_signal(number)

    def ends_with(self, code: int) -> None:
        """Wait for its end, which must be with this exit code, and for that of its children."""
        family = self.family()
        ended = self.process.wait(LIMIT)
        for reader in self._readers:
            reader.join(LIMIT)
        wait_until(lambda: gone(family), "children end with the command")
        assert ended == code, self.text


class Pty:
    """A command in a terminal of its own."""

    def __init__(self, runtime: Path, *arguments: str | Path, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "headrace.scripts.main", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env=environment(runtime, **{"TERM": "xterm", **env}),
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def __enter__(self) -> Pty:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(LIMIT)
        os.close(self._ours)

    def wait_for(self, text: str) -> str:
        """Read until a text has come; what came up to it is done with."""
        deadline = time.monotonic() + LIMIT
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.text}"
            if select.select([self._ours], [], [], 1)[0]:
                try:
                    self.text += os.read(self._ours, 4096).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"{text!r} never came before the end:\n{self.text}") from None
        before, _, self.text = self.text.partition(text)
        return before

    def type(self, text: str) -> None:
        """Keys."""
        os.write(self._ours, text.encode())

    def ended(self) -> int:
        """The exit code."""
        return self.process.wait(LIMIT)
