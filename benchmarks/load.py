"""Sends requests when their time has come, and notes when tokens come back. Knows neither broker nor HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from headrace.benchmarks.metrics import Served
from headrace.client import AsyncClient, Timeouts

__all__ = ["Opener", "client_opener", "patient_client", "run_load"]

# Sends a prompt; gives out how many tokens came, whenever some do.
Opener = Callable[[Sequence[int]], AsyncGenerator[int, None]]


async def run_load(
    send: Opener,
    prompts: Sequence[Sequence[int]],
    times: Sequence[float],
    *,
    output_tokens: int,
    concurrency: int | None = None,
) -> list[Served]:
    """Send each prompt at its time, and read all answers; one that fails or ends early has its error.

    Args:
        send: sends a request and reads its answer.
        prompts: token ids.
        times: of sending, in seconds from now.
        output_tokens: that each answer must have.
        concurrency: most requests under way at once; a request that waits for others is not yet sent.
    """
    gate = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
    start = time.perf_counter()

    async def one(prompt: Sequence[int], at: float) -> Served:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        async with gate:
            return await _serve(send, prompt, output_tokens)

    return await asyncio.gather(*(one(prompt, at) for prompt, at in zip(prompts, times, strict=True)))


async def _serve(send: Opener, prompt: Sequence[int], output_tokens: int) -> Served:
    came: list[tuple[float, int]] = []
    sent = time.perf_counter()
    try:
        async with aclosing(send(prompt)) as answer:
            async for count in answer:
                if count:
                    came.append((time.perf_counter(), count))
    except Exception as error:  # it costs this request, whatever it is
        return Served(sent=sent, arrivals=tuple(came), error=f"{type(error).__name__}: {error}")
    served = Served(sent=sent, arrivals=tuple(came))
    if served.tokens != output_tokens:
        why = f"it ended after {served.tokens} of {output_tokens} tokens"
        return Served(sent=sent, arrivals=tuple(came), error=why)
    return served


def patient_client(endpoint: str) -> AsyncClient:
    """A client that waits as long as a queue takes."""
    return AsyncClient(endpoint, timeouts=Timeouts(first_token=None, between_tokens=None))


def client_opener(client: AsyncClient, *, output_tokens: int) -> Opener:
    """Through the broker, by the Python client."""

    async def send(prompt: Sequence[int]) -> AsyncGenerator[int, None]:
        stream = client.stream(token_ids=prompt, temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        async with stream:
            async for delta in stream:
                yield len(delta.token_ids)

    return send
