"""Seconds from nothing to the first token: a fresh process loads a model folder with the settings of `headrace up`.

    process     until the interpreter runs
    import      torch, transformers and ours
    load        the weights, from the folder to where they stay
    warm_up     kernels compiled, CUDA graphs captured; a group says that it is ready
    first_token of a short prompt

The engine's own process is measured, which is what a worker of a group does, without broker and launcher around it.
`cold`: no kernel is compiled yet, and the files of the weights are dropped from the memory of the system. `warm`: the
next start, and the ones after it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.benchmarks.report import Row
from headrace.benchmarks.session import Session
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.subject import OURS
from headrace.errors import HeadraceError
from headrace.processes import Child, parent

__all__ = ["PHASES", "start", "startup"]

PHASES = ("process", "import", "load", "warm_up", "first_token")
_PATIENCE = 900.0
_PROMPT = 32


def startup(session: Session, source: Source, *, starts: int) -> None:
    """Start cold once and warm `starts` times, and add a row for each kind."""
    folder, model = session.folder(source), session.model(source)
    with tempfile.TemporaryDirectory(prefix="hr") as caches:
        _drop(folder)
        for kind, count in (("cold", 1), ("warm", starts)):
            figure = _figure(session, folder, source.dtype, Path(caches), count)
            name = f"startup {kind}"
            session.report.add(
                Row(
                    measure=name,
                    title="Start: seconds from a fresh process to its first token",
                    unit="s",
                    model=f"{source.name}, {kind}",
                    dtype=model["dtype"],
                    case={},
                    figures={OURS: figure},
                    **session.report.known(name, source.shape, model["dtype"]),
                )
            )


def _figure(session: Session, folder: Path, dtype: str, caches: Path, count: int) -> dict[str, Any]:
    """The median start, as its phases; they add up."""
    found = []
    for _ in range(count):
        try:
            found.append(_once(session, folder, dtype, caches))
        except HeadraceError as error:
            return {"error": error.message}
    times = sorted(found, key=lambda phases: sum(phases.values()))
    phases = times[(len(times) - 1) // 2]
    total = [sum(one.values()) for one in found]
    return {
        "value": sum(phases.values()),
        "starts": count,
        "mean_s": statistics.fmean(total),
        **{f"{name}_s": phases[name] for name in PHASES},
        "ready_s": sum(phases[name] for name in PHASES[:-1]),
    }


def _once(session: Session, folder: Path, dtype: str, caches: Path) -> dict[str, float]:
    """Seconds of each phase."""
    settings = {
        "folder": str(folder),
        "config": {
            "dtype": dtype,
            "device": session.settings.device,
            "cuda_graphs": not session.settings.eager,
        },
        "threads": session.threads,
        "caches": str(caches),
    }
    spawned = time.monotonic()
    with Child("bench-start", start, settings) as child:
        said = child.wait_ready(_PATIENCE)
    spans = itertools.pairwise([spawned, *said["times"]])
    return {name: after - before for name, (before, after) in zip(PHASES, spans, strict=True)}


def start(*, folder: str, config: dict[str, Any], threads: int, caches: str) -> None:
    """Be the process that starts: says when each phase was over, by the clock that all processes of a machine share.

    Raises:
        HeadraceError: the model cannot be loaded.
    """
    times = [time.monotonic()]
    for variable, name in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ[variable] = f"{caches}/{name}"
    from headrace.workers.rank_threads import use_threads

    use_threads(threads, crowded=False)
    from headrace.workers.config import EngineConfig
    from headrace.workers.engines import load_engine

    times.append(time.monotonic())
    engine = load_engine(Path(folder), EngineConfig(**config))
    times.append(time.monotonic())
    engine.warm_up()
    times.append(time.monotonic())
    _first_token(engine)
    times.append(time.monotonic())
    boss = parent()
    assert boss is not None
    boss.ready(times=times)


def _first_token(engine: Any) -> None:
    from headrace.messages import Assignment, pack_tokens
    from headrace.tasks import EMBED, GENERATE

    task = GENERATE if GENERATE in engine.card.tasks else EMBED
    sampling = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True} if task == GENERATE else {}
    prompt = pack_tokens(number % engine.card.vocab_size for number in range(_PROMPT))
    engine.add(Assignment(request=b"first", choice=0, attempt=1, prompt=prompt, sampling=sampling, task=task), 0.0)
    while engine.has_work:
        result = engine.step(0.0)
        if result.refusals:
            raise RuntimeError(str(result.refusals[0].error.get("message", "refused")))


def _drop(folder: Path) -> None:
    """Let the system forget the weights, where it can be asked to: only what is on the disk can be dropped."""
    for path in _files(folder):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> Iterator[Path]:
    return folder.glob("*.safetensors") if hasattr(os, "posix_fadvise") else iter(())
