"""The client of HTTP endpoints, against a server that answers as it is told: counts, chunks, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from headrace.benchmarks.load import run_load
from headrace.benchmarks.openai_stream import Endpoint, endpoint_opener
from headrace.errors import ConfigError


def event(**fields):
    return f"data: {json.dumps(fields)}\n\n".encode()


def chunk(**choice):
    return event(choices=[{"index": 0, "finish_reason": None, "text": "", **choice}])


DONE = b"data: [DONE]\n\n"


def serve(parts, *, status=200, chunked=True, output_tokens=3):
    """The one request that is sent, and what came of it."""
    seen, answered = {}, None

    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split()[0])
        seen.update(head=head, body=json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {status} Because\r\n".encode())
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Connection: close\r\n\r\n")
        for part in parts:
            writer.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            with contextlib.suppress(OSError):  # the client has left after an error
                await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n" if chunked else b"")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        answered.set()

    async def run():
        nonlocal answered
        answered = asyncio.Event()
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            endpoint = Endpoint.of(f"http://127.0.0.1:{port}/v1/", model="m", key="secret")
            send = endpoint_opener(endpoint, output_tokens=output_tokens)
            [served] = await run_load(send, [[5, 6]], [0.0], output_tokens=output_tokens)
            await answered.wait()
            return served

    return seen, asyncio.run(run())


@pytest.mark.parametrize("chunked", [True, False])
def test_tokens_that_are_named(chunked):
    """Two arrive together; the end brings none."""
    parts = [chunk(token_ids=[1]), chunk(token_ids=[2, 3]), chunk(token_ids=[], finish_reason="length"), DONE]
    seen, served = serve(parts, chunked=chunked)

    assert served.error is None
    assert [count for _, count in served.arrivals] == [1, 2]
    assert served.gaps[0] > 0.005
    assert seen["head"].startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer secret\r\n" in seen["head"]
    assert seen["body"]["prompt"] == [5, 6]
    assert seen["body"]["ignore_eos"] is seen["body"]["stream"] is True


def test_chunks_count_where_tokens_are_not_named():
    """Three chunks of text and the reason of the end; the usage agrees."""
    texts = [chunk(text=text) for text in "abc"]
    _, served = serve([*texts, chunk(finish_reason="length"), event(choices=[], usage={"completion_tokens": 3}), DONE])

    assert [count for _, count in served.arrivals] == [1, 1, 1]


def test_tokens_that_only_the_usage_knows():
    _, served = serve([chunk(text="abc"), event(choices=[], usage={"completion_tokens": 3}), DONE])

    assert served.error is None
    assert [count for _, count in served.arrivals] == [1, 2]


def test_an_event_in_two_pieces():
    whole = chunk(token_ids=[1, 2, 3])
    _, served = serve([whole[:9], whole[9:], DONE])

    assert served.tokens == 3


@pytest.mark.parametrize(
    ("parts", "status", "expected"),
    [
        ([b'{"error": "no such model"}'], 404, "the server answered 404"),
        ([chunk(token_ids=[1]), event(error="out of memory"), DONE], 200, "the server said: out of memory"),
        ([chunk(token_ids=[1]), DONE], 200, "it ended after 1 of 3 tokens"),
    ],
)
def test_failures_cost_the_request(parts, status, expected):
    _, served = serve(parts, status=status)

    assert expected in served.error


def test_nobody_listens():
    endpoint = Endpoint.of("http://127.0.0.1:9", model="m")
    [served] = asyncio.run(run_load(endpoint_opener(endpoint, output_tokens=1), [[1]], [0.0], output_tokens=1))

    assert "Connect" in served.error


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://", "nonsense"])
def test_urls(url):
    with pytest.raises(ConfigError, match="is no URL"):
        Endpoint.of(url, model="m")


def test_parts_of_a_url():
    found = Endpoint.of("https://host/v1/", model="m")

    assert found == Endpoint(host="host", port=443, path="/v1", tls=True, model="m")
