"""The same requests in process and through broker and client: what the road between them costs.

    throughput    all requests at once, until the last token; through the pool at least 97% of it
    first token   of one request after the other, nothing else running; through the pool at most 2 ms later

Both run the same engine with the same settings, one after the other, so neither takes memory or cores from the other.
Before each single request both are idle for the same time, for what idles is slower: cores, and a GPU.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headrace.benchmarks.load import client_opener, patient_client, run_load
from headrace.benchmarks.measure import Case
from headrace.benchmarks.metrics import Served, prompts, summarize
from headrace.benchmarks.report import Row
from headrace.benchmarks.serving import figure_of, in_pool
from headrace.benchmarks.session import Session
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.subject import OURS, Room

__all__ = ["KEPT", "MOST_ADDED_MS", "compare"]

KEPT = 0.97  # of the throughput in process
MOST_ADDED_MS = 2.0  # to the first token

_SINGLES = 20
_IDLE = 0.01  # seconds before each of them


def compare(session: Session, source: Source, *, requests: int, prompt_tokens: int, output_tokens: int) -> None:
    """Measure both, and add two rows besides those of the engine in process."""
    before = len(session.report.rows)
    together = Case(
        measure="throughput",
        source=source,
        batch=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        alone=True,
    )
    single = replace(together, measure="latency", batch=1, output_tokens=1, rounds=_SINGLES, pause=_IDLE)
    session.compare([together, single])
    rows = session.report.rows[before:]
    inside = [row.value(session.ours) for row in rows]
    if len(inside) < 2 or None in inside:
        return  # the rows say why
    model = session.model(source)
    length = prompt_tokens + output_tokens
    room = Room(
        sequences=requests,
        length=length,
        tokens=requests * length,
        step_tokens=session.settings.step_tokens,
        seed=session.settings.seed,
    )
    figures, about = in_pool(
        session,
        source,
        room,
        lambda endpoint: _through(
            endpoint, requests, prompt_tokens, output_tokens, model["vocab_size"], session.settings.seed
        ),
    )
    rate, first = (float(value or 0.0) for value in inside)
    case = {"requests": requests, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    common = {"model": source.name, "dtype": model["dtype"], "quantize": source.quantize}
    session.report.add(
        Row(
            measure="compare throughput",
            title="Through broker and client: tokens per second, all requests at once",
            unit="tok/s",
            more_is_better=True,
            case=case,
            figures={OURS: figures[0] | about | {"in_process": rate}},
            limit=rows[0].limit,
            goal=KEPT * rate,
            **common,
        )
    )
    session.report.add(
        Row(
            measure="compare first token",
            title="Through broker and client: ms to the first token, one request at a time",
            unit="ms",
            case=case | {"requests": 1, "output_tokens": 1},
            figures={OURS: figures[1] | {"in_process": first}},
            limit=rows[1].limit,
            goal=first + MOST_ADDED_MS,
            **common,
        )
    )


async def _through(
    endpoint: str, requests: int, prompt_tokens: int, output_tokens: int, vocab_size: int, seed: int
) -> list[dict[str, Any]]:
    """Figures of both loads."""
    async with patient_client(endpoint) as client:
        many, one = (client_opener(client, output_tokens=count) for count in (output_tokens, 1))

        async def singles(count: int, at: int) -> list[Served]:
            served = []
            for prompt in prompts(count, prompt_tokens, vocab_size, seed + at):
                await asyncio.sleep(_IDLE)
                served += await run_load(one, [prompt], [0.0], output_tokens=1)
            return served

        await singles(3, 1)
        together = await run_load(
            many, prompts(requests, prompt_tokens, vocab_size, seed + 2), [0.0] * requests, output_tokens=output_tokens
        )
        alone = await singles(_SINGLES, 3)
    return [figure_of(summarize(together), _errors(together)), _first(alone)]


def _first(served: Sequence[Served]) -> dict[str, Any]:
    if errors := _errors(served):
        return {"error": errors[0]}
    return {"value": statistics.median(one.ttft for one in served) * 1e3}


def _errors(served: Sequence[Served]) -> list[str]:
    return [one.error for one in served if one.error is not None]
