"""Requests served: by a pool of real processes as `headrace up` starts it, through broker and Python client, or by an
endpoint of OpenAI's API elsewhere. What the client sees, by the definitions in `metrics`.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from headrace.benchmarks.load import Opener, client_opener, patient_client, run_load
from headrace.benchmarks.metrics import arrivals, prompts, summarize
from headrace.benchmarks.openai_stream import Endpoint, endpoint_opener
from headrace.benchmarks.ours import config_for
from headrace.benchmarks.report import Row
from headrace.benchmarks.session import Session
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.subject import OURS, Room
from headrace.client import Client
from headrace.errors import UnavailableError
from headrace.scripts.greeting import find_card

if TYPE_CHECKING:
    from headrace.scripts.pool import Pool

__all__ = ["Load", "figure_of", "in_pool", "serve_endpoint", "serve_source"]

T = TypeVar("T")

_WARM_REQUESTS = 3
_HEARTBEAT = 1.5  # seconds, in which each group says at least once how it is
_TITLE = "Serve: requests through broker and client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What comes in.

    Attributes:
        requests: how many.
        prompt_tokens: of each.
        output_tokens: of each.
        rate: requests per second, on average; infinite for all at once.
        concurrency: most that are under way at once; None for no limit.
        seed: of prompts and arrivals.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    rate: float
    concurrency: int | None
    seed: int

    @property
    def at_once(self) -> int:
        """Most requests that can be under way together."""
        return min(self.requests, self.concurrency or self.requests)

    def case(self) -> dict[str, Any]:
        """For a row."""
        case: dict[str, Any] = {"requests": self.requests}
        case["rate"] = "all at once" if math.isinf(self.rate) else self.rate
        return case | {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}

    async def run(self, send: Opener, vocab_size: int) -> dict[str, Any]:
        """Send it, after a few requests that nobody times; the figures of a row."""
        warm = prompts(_WARM_REQUESTS, self.prompt_tokens, vocab_size, self.seed)
        texts = prompts(self.requests, self.prompt_tokens, vocab_size, self.seed + 1)
        failed = [
            one.error
            for one in await run_load(send, warm, [0.0] * len(warm), output_tokens=self.output_tokens)
            if one.error is not None
        ]
        if failed:
            return {"error": failed[0]}
        times = arrivals(self.requests, self.rate, self.seed)
        served = await run_load(send, texts, times, output_tokens=self.output_tokens, concurrency=self.concurrency)
        return figure_of(summarize(served), [one.error for one in served if one.error is not None])


def figure_of(summary: dict[str, float], errors: Sequence[str]) -> dict[str, Any]:
    """A row's figure; requests that failed are counted, and the first of them says why."""
    if not summary["completed"]:
        return {"error": errors[0] if errors else "no tokens came"}
    said = {"first_error": errors[0]} if errors else {}
    return {"value": summary["tokens_per_s"], **summary, **said}


def serve_source(session: Session, source: Source, load: Load) -> None:
    """Serve a model by a pool of its own, and add the row."""
    room = Room(
        sequences=load.at_once,
        length=load.prompt_tokens + load.output_tokens,
        tokens=load.at_once * (load.prompt_tokens + load.output_tokens),
        step_tokens=session.settings.step_tokens,
        seed=session.settings.seed,
    )
    model = session.model(source)

    async def work(endpoint: str) -> dict[str, Any]:
        async with patient_client(endpoint) as client:
            return await load.run(client_opener(client, output_tokens=load.output_tokens), model["vocab_size"])

    figure, about = in_pool(session, source, room, work)
    figure |= about
    session.report.add(_row(source.name, model["dtype"], load, {OURS: figure}, _TITLE, quantize=source.quantize))


def serve_endpoint(session: Session, endpoint: Endpoint, load: Load, vocab_size: int) -> None:
    """Measure a server that runs, and add the row."""
    figure = asyncio.run(load.run(endpoint_opener(endpoint, output_tokens=load.output_tokens), vocab_size))
    where = f"{endpoint.host}:{endpoint.port}"
    session.report.add(_row(endpoint.model, "-", load, {where: figure}, f"Serve: requests to {where}"))


def _row(
    name: str,
    dtype: str,
    load: Load,
    figures: dict[str, dict[str, Any]],
    title: str,
    *,
    quantize: str | None = None,
) -> Row:
    return Row(
        measure="serve",
        title=title,
        unit="tok/s",
        more_is_better=True,
        model=name,
        dtype=dtype,
        quantize=quantize,
        case=load.case(),
        figures=figures,
    )


def in_pool(
    session: Session, source: Source, room: Room, work: Callable[[str], Coroutine[Any, Any, T]]
) -> tuple[T, dict[str, float]]:
    """Start broker and a worker group, let `work` talk to the endpoint, and end them.

    Also what its figures say of the pool: the seconds until it was ready, and the kernels that it compiled afterwards,
    of which there should be none.

    Raises:
        HeadraceError: they could not start, or failed.
    """
    from headrace.scripts.pool import Plan, Pool

    model, folder = session.model(source), session.folder(source)
    device, graphs = session.settings.device, not session.settings.eager
    config = config_for(room, source, model["max_positions"], device=device, graphs=graphs)
    with tempfile.TemporaryDirectory(prefix="hr") as runtime:
        plan = Plan(
            model=str(folder),
            name=None,
            config=config,
            client_endpoint=f"ipc://{Path(runtime) / 'clients.sock'}",
            worker_endpoint=f"ipc://{Path(runtime) / 'workers.sock'}",
            threads=session.threads,
            grace=1.0,
        )
        visitor = _Visitor(work)
        started = time.monotonic()
        code = Pool(plan, session.terminal, visitor).run()
    if not visitor.results:
        raise SystemExit(code or 130)
    if visitor.compilations:
        session.terminal.note(f"{visitor.compilations} kernels were compiled while requests were served")
    return visitor.results[0], {"pool_ready_s": visitor.at - started, "compilations": visitor.compilations}


class _Visitor(Generic[T]):
    """What a pool does once it is ready: the work, then the end."""

    def __init__(self, work: Callable[[str], Coroutine[Any, Any, T]]) -> None:
        self.results: list[T] = []
        self.at = 0.0
        self.compilations = 0
        self._work = work
        self._stop: Callable[[], None] | None = None

    def run(self, pool: Pool) -> int | None:
        """Do the work; the pool ends with it."""
        self.at = time.monotonic()
        with Client(pool.client_endpoint) as client:
            find_card(client, pool.model)
        try:
            self.results.append(asyncio.run(self._cancellable(pool.client_endpoint)))
        except asyncio.CancelledError:
            return None  # whoever stopped it ends the pool
        time.sleep(_HEARTBEAT)
        with Client(pool.client_endpoint) as client:
            self.compilations = sum(group["load"].get("compilations", 0) for group in client.status()["groups"])
        return 0

    def stop(self) -> None:
        """Break off."""
        if self._stop is not None:
            self._stop()

    async def _cancellable(self, endpoint: str) -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None:
            raise UnavailableError("The load cannot run outside of an event loop.")

        def stop() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        self._stop = stop
        return await self._work(endpoint)
