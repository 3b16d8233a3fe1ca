"""One generation over HTTP, whatever its endpoint: run the prompts, write them as a body or as a stream of events.

The response starts with the first token, not before: until then an error still gets the status it deserves. After that
it becomes an event in the stream. A client that leaves cancels its streams, with a token on the way or not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.card import ModelCard
from headrace.errors import HeadraceError
from headrace.gateway.errors import JSONAnswer
from headrace.gateway.metrics import Meter
from headrace.gateway.shapes import Head, Shape, total_usage, usage_object
from headrace.gateway.sse import PING, EventStream, frame, unless_gone
from headrace.gateway.state import Gateway, gateway_of
from headrace.gateway.streams import Piece, Streams

__all__ = ["Job", "answer", "run_whole"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Prompts for one model: each a map with `prompt`, `messages` or `token_ids`, as the client library takes them."""

    card: ModelCard
    inputs: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any]
    n: int = 1


def _start(gateway: Gateway, job: Job, meter: Meter) -> Streams:
    common = {"model": job.card.name, "timeout": gateway.settings.request_timeout, **job.sampling}
    return Streams([partial(gateway.client.stream, **each, **common) for each in job.inputs], meter)


async def run_whole(request: Request, job: Job) -> list[Any]:
    """The completions of all prompts, in order.

    Raises:
        HeadraceError: one failed; the others are cancelled.
        ClientGoneError: nobody waits any more.
    """
    gateway = gateway_of(request)
    meter = gateway.metrics.meter(job.card.name)
    streams = _start(gateway, job, meter)
    try:
        completions = await unless_gone(request, streams.results())
        meter.finished(completions)
    except HeadraceError as error:
        meter.failed(error)
        raise
    finally:
        await streams.aclose()
        meter.left()
    return completions


async def answer(request: Request, job: Job, shape: Shape, *, stream: bool, usage: bool, steady: bool) -> Response:
    """The response of an OpenAI endpoint.

    Args:
        request: what is answered.
        job: what to generate.
        shape: how to write it.
        stream: as events.
        usage: end the events with one that holds the token counts.
        steady: and put the counts so far into each event.
    """
    if stream:
        return await _as_events(request, job, shape, usage=usage, steady=steady)
    completions = await run_whole(request, job)
    choices = [
        shape.whole(number * job.n + choice.index, choice)
        for number, completion in enumerate(completions)
        for choice in completion.choices
    ]
    body = Head(shape.prefix, job.card).body(shape.object, choices, usage=total_usage(c.usage for c in completions))
    return JSONAnswer(body)


async def _as_events(request: Request, job: Job, shape: Shape, *, usage: bool, steady: bool) -> Response:
    gateway = gateway_of(request)
    meter = gateway.metrics.meter(job.card.name)
    streams = _start(gateway, job, meter)

    async def close() -> None:
        await streams.aclose()
        meter.left()

    try:
        first = await unless_gone(request, streams.pieces())
    except BaseException as error:
        if isinstance(error, HeadraceError):
            meter.failed(error)
        await close()
        raise
    writer = _EventWriter(job, shape, streams, usage=usage or steady, steady=steady)
    frames = _frames(streams, first, writer, meter, gateway.settings.ping_interval)
    return EventStream(frames, close)


async def _frames(
    streams: Streams, pieces: list[Piece], writer: _EventWriter, meter: Meter, ping_interval: float
) -> AsyncGenerator[bytes, None]:
    try:
        while True:
            if data := b"".join(frame(chunk) for piece in pieces for chunk in writer.chunks(piece)):
                yield data
            if streams.done:
                break
            pieces = await streams.pieces(ping_interval)
            if not pieces and not streams.done:
                yield PING
        completions = await streams.results()
        meter.finished(completions)
        if writer.usage:
            yield frame(writer.last(completions))
    except HeadraceError as error:
        meter.failed(error)
        raise


class _EventWriter:
    """Turns pieces into chunks; remembers which choices have been opened."""

    def __init__(self, job: Job, shape: Shape, streams: Streams, *, usage: bool, steady: bool) -> None:
        self.usage = usage
        self._steady = steady
        self._head = Head(shape.prefix, job.card)
        self._shape = shape
        self._n = job.n
        self._streams = streams
        self._opened: set[int] = set()
        self._generated = 0

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that one piece makes: one choice each."""
        index = piece.prompt * self._n + piece.delta.choice
        choices: list[dict[str, Any]] = []
        if index not in self._opened:
            self._opened.add(index)
            choices += self._shape.opening(index)
        choices += self._shape.pieces(index, piece.delta)
        self._generated += len(piece.delta.token_ids)
        return [self._head.body(self._shape.chunk_object, [choice], **self._so_far()) for choice in choices]

    def _so_far(self) -> dict[str, Any]:
        if self._steady:
            return {"usage": usage_object(self._streams.prompt_tokens, self._generated)}
        return {"usage": None} if self.usage else {}

    def last(self, completions: Sequence[Any]) -> dict[str, Any]:
        """The chunk without choices that holds the token counts."""
        return self._head.body(self._shape.chunk_object, [], usage=total_usage(c.usage for c in completions))
