"""`/v1/chat/completions` and `/v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.gateway.answer import Job, answer
from headrace.gateway.errors import JSONAnswer
from headrace.gateway.openai import ChatRequest
from headrace.gateway.shapes import ChatShape, model_object
from headrace.gateway.state import gateway_of

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models")
async def models(request: Request) -> Response:
    """The served models."""
    cards = await gateway_of(request).catalog.cards(fresh=True)
    return JSONAnswer({"object": "list", "data": [model_object(card) for card in cards]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One served model."""
    return JSONAnswer(model_object(await gateway_of(request).catalog.find(name)))


@router.post("/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a chat."""
    inputs: list[dict[str, Any]] = [{"messages": body.chat()}]
    sampling = body.sampling()
    card = await gateway_of(request).catalog.find(body.model)
    options = body.stream_options
    return await answer(
        request,
        Job(card=card, inputs=inputs, sampling=sampling, n=body.n or 1),
        ChatShape(logprobs=body.logprobs, token_ids=body.return_token_ids),
        stream=body.stream,
        usage=bool(options and options.include_usage),
        steady=bool(options and options.continuous_usage_stats),
    )
