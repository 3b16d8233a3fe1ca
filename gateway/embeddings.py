"""`/v1/embeddings`: vectors of texts or token ids, as OpenAI's, with the client library's settings beside them."""

from __future__ import annotations

import base64
import sys
from array import array
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.errors import HeadraceError, InvalidRequestError
from headrace.gateway.errors import JSONAnswer
from headrace.gateway.openai import Body
from headrace.gateway.sse import unless_gone
from headrace.gateway.state import gateway_of

__all__ = ["EmbeddingRequest", "router"]

router = APIRouter(prefix="/v1", tags=["OpenAI"])

MAX_TEXTS = 2048  # as OpenAI's


class EmbeddingRequest(Body):
    """Body of `/v1/embeddings`."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    # Not OpenAI's: what is left out is the model's own way.
    pooling: str | None = None
    normalize: bool | None = None
    truncate: bool = False

    harmless = frozenset({"user"})

    def texts(self) -> list[str | list[int]]:
        """The texts, each a string or token ids.

        Raises:
            InvalidRequestError: there are none, too many, or an empty one.
        """
        given: Any = self.input
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        texts: list[str | list[int]] = [given] if single else given
        if not 0 < len(texts) <= MAX_TEXTS:
            raise InvalidRequestError(
                f"input holds {len(texts)} texts; give 1 to {MAX_TEXTS:,} in one request.", param="input"
            )
        if not all(texts):
            raise InvalidRequestError("input holds an empty text; give some text or token ids.", param="input")
        return texts


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """The vectors of one text or of several."""
    gateway = gateway_of(request)
    texts = body.texts()
    card = await gateway.card(body.model)
    meter = gateway.metrics.meter(card.name)
    work = gateway.client.embed(
        texts,
        model=card.name,
        pooling=body.pooling,
        normalize=body.normalize,
        dimensions=body.dimensions,
        truncate=body.truncate,
        timeout=gateway.settings.request_timeout,
    )
    try:
        found = await unless_gone(request, work)
        meter.read(found.prompt_tokens)
    except HeadraceError as error:
        if error.param in ("texts", "token_ids"):
            error.param = "input"
        meter.failed(error)
        raise
    finally:
        meter.left()
    encode = _base64 if body.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    return JSONAnswer({"object": "list", "data": data, "model": card.name, "usage": usage})


def _base64(vector: array[float]) -> str:
    """Little-endian float32, as OpenAI's SDK asks for by default."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()
