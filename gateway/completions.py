"""`/v1/completions`: texts or token ids continued, without a chat template."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.gateway.answer import Job, answer
from headrace.gateway.openai import CompletionRequest, Prompt
from headrace.gateway.shapes import CompletionShape
from headrace.gateway.state import Gateway, gateway_of

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.post("/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue one prompt or several."""
    gateway = gateway_of(request)
    prompts = body.prompts()
    sampling = body.sampling()
    card = await gateway.card(body.model)
    inputs: list[dict[str, Any]] = [
        {"prompt": prompt} if isinstance(prompt, str) else {"token_ids": prompt} for prompt in prompts
    ]
    n = body.n or 1
    options = body.stream_options
    shape = CompletionShape(
        logprobs=body.logprobs is not None,
        token_ids=body.return_token_ids,
        n=n,
        echoes=await _echoes(gateway, card.name, prompts) if body.echo else (),
    )
    return await answer(
        request,
        Job(card=card, inputs=inputs, sampling=sampling, n=n),
        shape,
        stream=body.stream,
        usage=bool(options and options.include_usage),
        steady=bool(options and options.continuous_usage_stats),
    )


async def _echoes(gateway: Gateway, model: str, prompts: list[Prompt]) -> list[str]:
    """The prompts as text; decoding long ones must not hold up other streams, so it is done in a thread."""
    if all(isinstance(prompt, str) for prompt in prompts):
        return [prompt for prompt in prompts if isinstance(prompt, str)]
    text = await gateway.client.text(model)
    return await asyncio.to_thread(lambda: [p if isinstance(p, str) else text.decode(p) for p in prompts])
