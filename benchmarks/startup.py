"""Seconds from nothing to the first token: a worker group of its own, started as `headrace up` starts it.

The clock begins when the launcher starts the group's process, and ends when a client has the first token of a short
prompt; a broker runs already. Between are the phases that the group tells of (`headrace.workers.start_report`), from
imports to the broker's answer, and the first token.

`cold`: no kernel is compiled yet, and the files of the weights are dropped from the memory of the system. `warm`: the
next start, and the ones after it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.benchmarks.report import Row
from headrace.benchmarks.session import Session
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.subject import OURS
from headrace.client import Client, Timeouts
from headrace.errors import HeadraceError, InternalError
from headrace.processes import Child
from headrace.scripts.greeting import find_card
from headrace.scripts.parts import run_broker
from headrace.tasks import GENERATE
from headrace.workers.config import EngineConfig
from headrace.workers.group import GroupEvent, GroupSpec
from headrace.workers.launcher import Launcher
from headrace.workers.start_report import StartReport

__all__ = ["startup"]

_PATIENCE = 900.0
_PROMPT = 32
_MODEL = "started"


def startup(session: Session, source: Source, *, starts: int) -> None:
    """Start cold once and warm `starts` times, and add a row for each kind."""
    folder, model = session.folder(source), session.model(source)
    spec = GroupSpec(
        name="bench",
        folder=folder,
        model_name=_MODEL,
        config=EngineConfig(
            dtype=source.dtype,
            quantize=source.quantize,
            device=session.settings.device,
            cuda_graphs=not session.settings.eager,
        ),
        threads=session.threads,
    )
    with tempfile.TemporaryDirectory(prefix="hr") as caches, _environment(TRITON_CACHE_DIR=caches):
        _drop(folder)
        for kind, count in (("cold", 1), ("warm", starts)):
            name = f"startup {kind}"
            session.report.add(
                Row(
                    measure=name,
                    title="Start: seconds from a fresh process to its first token",
                    unit="s",
                    model=f"{source.name}, {kind}",
                    dtype=model["dtype"],
                    quantize=source.quantize,
                    case={},
                    figures={OURS: _figure(spec, count)},
                    **session.report.known(name, source.shape, model["dtype"], source.quantize),
                )
            )


def _figure(spec: GroupSpec, count: int) -> dict[str, Any]:
    """The median start, with its phases."""
    found = []
    for _ in range(count):
        try:
            found.append(_once(spec))
        except HeadraceError as error:
            return {"error": error.message}
    found.sort(key=lambda figure: figure["value"])
    mean = statistics.fmean(figure["value"] for figure in found)
    return found[(len(found) - 1) // 2] | {"starts": count, "mean_s": mean}


def _once(spec: GroupSpec) -> dict[str, float]:
    """One start: in all, and of each phase, in seconds."""
    with tempfile.TemporaryDirectory(prefix="hr") as runtime, contextlib.ExitStack() as stack:
        broker = stack.enter_context(
            Child(
                "bench-broker",
                run_broker,
                {"client_endpoint": f"ipc://{runtime}/c.sock", "worker_endpoint": f"ipc://{runtime}/w.sock"},
            )
        )
        where = broker.wait_ready(_PATIENCE)
        client = stack.enter_context(Client(where["endpoint"], timeouts=Timeouts(first_token=_PATIENCE)))
        news: queue.SimpleQueue[GroupEvent] = queue.SimpleQueue()
        launcher = stack.enter_context(Launcher([spec], where["worker_endpoint"], on_event=news.put))
        began = time.monotonic()
        launcher.start()
        watch = threading.Thread(target=launcher.run, name="bench-launcher", daemon=True)
        watch.start()
        stack.callback(watch.join)
        stack.callback(launcher.stop, 1.0)
        report = _ready(news, began + _PATIENCE)
        ready = time.monotonic()
        _first_token(client)
        ended = time.monotonic()
    phases = {f"{phase.name}_s": phase.seconds for phase in report.phases}
    return {"value": ended - began, "ready_s": ready - began, **phases, "first_token_s": ended - ready}


def _ready(news: queue.SimpleQueue[GroupEvent], deadline: float) -> StartReport:
    """Where the time went, once the group serves."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            event = news.get(timeout=left)
        except queue.Empty:
            break
        if event.kind in ("lost", "failed"):
            raise event.error or InternalError(f"The group did not start: {event.text}.")
        if event.kind == "ready" and event.start is not None:
            return event.start
    raise InternalError(f"The group was not ready after {_PATIENCE:.0f} s.")


def _first_token(client: Client) -> None:
    card = find_card(client, _MODEL)
    prompt = [number % card.vocab_size for number in range(_PROMPT)]
    if GENERATE in card.tasks:
        client.generate(token_ids=prompt, max_tokens=1, ignore_eos=True, temperature=0.0)
    else:
        client.embed([prompt])


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables of the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _drop(folder: Path) -> None:
    """Let the system forget the weights, where it can be asked to: only what is on the disk can be dropped."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
