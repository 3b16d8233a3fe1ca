"""`/generate`: the smallest possible API, `{"prompt": ...}` in and `{"generated_text": ...}` out."""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.errors import InvalidRequestError
from headrace.gateway.answer import Job, run_whole
from headrace.gateway.errors import JSONAnswer
from headrace.gateway.openai import GenerationBody
from headrace.gateway.state import gateway_of

__all__ = ["GenerateRequest", "router"]

router = APIRouter(tags=["Simple"])

_DEFAULT_TOKENS = 128


class GenerateRequest(GenerationBody):
    """Body of `/generate`.

    `max_length`, `max_new_tokens` and `max_tokens` mean the same here: the most tokens to generate.
    """

    prompt: str
    max_length: int | None = None
    max_new_tokens: int | None = None
    return_full_text: bool = False

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def sampling(self) -> dict[str, Any]:
        """The settings, with one length out of its three names."""
        settings = super().sampling()
        names = ("max_length", "max_new_tokens", "max_tokens")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            first = next(iter(given))
            raise InvalidRequestError(f"{' and '.join(given)} mean the same here; give one of them.", param=first)
        for name, value in given.items():
            if value < 1:
                raise InvalidRequestError(f"{name} is {value}; give a whole number from 1.", param=name)
        settings["max_tokens"] = next(iter(given.values()), _DEFAULT_TOKENS)
        for name, wanted in (("stream", self.stream), ("n", self.n not in (None, 1))):
            if wanted:
                raise InvalidRequestError(f"/generate has no {name}; use /v1/completions for it.", param=name)
        return settings


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Continue a prompt."""
    if not body.prompt:
        raise InvalidRequestError("prompt is empty; give some text.", param="prompt")
    sampling = body.sampling()
    card = await gateway_of(request).card(body.model)
    completion = (await run_whole(request, Job(card=card, inputs=[{"prompt": body.prompt}], sampling=sampling)))[0]
    return JSONAnswer(
        {
            "generated_text": (body.prompt if body.return_full_text else "") + completion.text,
            "finish_reason": completion.choices[0].finish_reason,
            "prompt_tokens": completion.usage.prompt_tokens,
            "generated_tokens": completion.usage.completion_tokens,
            "model": card.name,
        }
    )
