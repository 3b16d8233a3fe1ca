"""`/v1/chat/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.errors import InvalidRequestError
from headrace.gateway.answer import Job, answer
from headrace.gateway.errors import JSONAnswer
from headrace.gateway.openai import ChatRequest
from headrace.gateway.shapes import ChatShape, model_object
from headrace.gateway.state import gateway_of

if TYPE_CHECKING:
    from headrace.client import Text

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models")
async def models(request: Request) -> Response:
    """The served models."""
    cards = await gateway_of(request).client.models()
    return JSONAnswer({"object": "list", "data": [model_object(card) for card in cards]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One served model."""
    return JSONAnswer(model_object(await gateway_of(request).card(name)))


@router.post("/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a chat."""
    messages = body.chat()
    sampling = body.sampling()
    text = await gateway_of(request).client.text(body.model)
    source = await _unfinished(text, messages) if body.continue_final_message else {"messages": messages}
    options = body.stream_options
    return await answer(
        request,
        Job(card=text.card, inputs=[source], sampling=sampling, n=body.n or 1),
        ChatShape(logprobs=body.logprobs, token_ids=body.return_token_ids),
        stream=body.stream,
        usage=bool(options and options.include_usage),
        steady=bool(options and options.continuous_usage_stats),
    )


async def _unfinished(text: Text, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The tokens of a chat whose last message is not over yet; a thread makes them, for they may be many."""
    *before, last = messages
    if last["role"] != "assistant" or not before:
        raise InvalidRequestError(
            "continue_final_message needs a last message of the role assistant, and others before it.", param="messages"
        )

    def tokens() -> list[int]:
        return text.encode_chat(before) + text.encode(last["content"], add_special_tokens=False)

    return {"token_ids": await asyncio.to_thread(tokens)}
