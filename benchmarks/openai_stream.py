"""Reads completions as an endpoint of OpenAI's HTTP API streams them, ours or a vLLM server's: a minimal client on the
standard library, one connection per request, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from headrace.benchmarks.load import Opener
from headrace.errors import ConfigError

__all__ = ["Endpoint", "endpoint_opener"]

_LINE = 1 << 20  # bytes of the longest line


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server is.

    Attributes:
        host: name or address.
        port: TCP port.
        path: of the API, such as /v1.
        tls: whether it speaks HTTPS.
        model: name of the model that is asked.
        key: for the server; None for none.
    """

    host: str
    port: int
    path: str
    tls: bool
    model: str
    key: str | None = None

    @classmethod
    def of(cls, url: str, *, model: str, key: str | None = None) -> Endpoint:
        """From a URL such as http://127.0.0.1:8000/v1.

        Raises:
            ConfigError: it is none.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of a server; give one such as http://127.0.0.1:8000/v1.", param="url")
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        return cls(host=parts.hostname, port=port, path=parts.path.rstrip("/"), tls=tls, model=model, key=key)


def endpoint_opener(endpoint: Endpoint, *, output_tokens: int) -> Opener:
    """Through an HTTP endpoint: greedy completions of token ids, end tokens ignored.

    A chunk counts for as many tokens as it names (`return_token_ids`, which vLLM and our gateway know), else for one;
    tokens that only the usage at the end tells of arrive with it.
    """

    async def send(prompt: Sequence[int]) -> AsyncGenerator[int, None]:
        body = {
            "model": endpoint.model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        total = told = 0
        async with aclosing(_events(endpoint, body)) as events:
            async for event in events:
                for choice in event.get("choices") or ():
                    count = _count(choice)
                    if count:
                        total += count
                        yield count
                told = (event.get("usage") or {}).get("completion_tokens", told)
        if told > total:
            yield told - total

    return send


def _count(choice: dict[str, Any]) -> int:
    ids = choice.get("token_ids")
    if ids is not None:
        return len(ids)
    # A chunk that only says why the text ended is no token.
    return 1 if choice.get("text") or choice.get("finish_reason") is None else 0


async def _events(endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The events of one streamed answer."""
    context = ssl.create_default_context() if endpoint.tls else None
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context, limit=_LINE)
    try:
        writer.write(_request(endpoint, json.dumps(body).encode()))
        await writer.drain()
        status, headers = await _head(reader)
        chunked = "chunked" in headers.get("transfer-encoding", "")
        if status != 200:
            problem = b"".join([part async for part in _parts(reader, chunked, headers)])
            raise ConnectionError(f"the server answered {status}: {problem[:300].decode(errors='replace')}")
        async for line in _lines(_parts(reader, chunked, headers)):
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ConnectionError(f"the server said: {event['error']}")
                yield event
    finally:
        writer.close()
        with suppress(OSError):  # whatever it was, the answer is there or not
            await writer.wait_closed()


def _request(endpoint: Endpoint, body: bytes) -> bytes:
    lines = [
        f"POST {endpoint.path}/completions HTTP/1.1",
        f"Host: {endpoint.host}:{endpoint.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if endpoint.key is not None:
        lines.append(f"Authorization: Bearer {endpoint.key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    return status, headers


async def _parts(reader: asyncio.StreamReader, chunked: bool, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes."""
    if not chunked:
        left = int(headers.get("content-length", 1 << 60))
        while left > 0 and (part := await reader.read(min(left, 65536))):
            left -= len(part)
            yield part
        return
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
