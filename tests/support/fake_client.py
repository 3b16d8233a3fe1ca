"""An `AsyncClient` without a broker: it plays back scripts, so that the gateway's tests decide what a model says.

A script is a function of the call (model, prompt, messages, settings) that gives the steps of each choice: a string is
a token's text, an error is raised, a `threading.Event` is waited for, a number is a pause in seconds.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.card import ModelCard
from headrace.client.types import Choice, Completion, Delta, TokenLogprob, TopLogprob, Usage
from headrace.errors import RequestCancelledError, UnavailableError, UnknownModelError
from headrace.sampling import SamplingParams

__all__ = ["Call", "FakeClient", "card", "words"]

Step = str | float | Exception | threading.Event


def card(name: str = "tiny-chat", **changes: Any) -> ModelCard:
    """A model card."""
    fields: dict[str, Any] = {
        "architecture": "Qwen2ForCausalLM",
        "family": "qwen2",
        "fingerprint": "0123456789abcdef",
        "vocab_size": 300,
        "max_model_len": 512,
        "sampling_defaults": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
        "created": 1_700_000_000,
    }
    return ModelCard(name=name, **(fields | changes))


@dataclass
class Call:
    """What the gateway asked for."""

    model: str
    prompt: str | None
    messages: Sequence[dict[str, Any]] | None
    token_ids: Sequence[int] | None
    sampling: SamplingParams
    timeout: float | None
    ended: str = "running"  # then: finished, closed or failed
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def text(self) -> str:
        """The prompt, or the last message."""
        if self.messages:
            return str(self.messages[-1]["content"])
        return self.prompt or ""


def words(text: str) -> list[str]:
    """A text as tokens: words with the space before them."""
    first, *rest = text.split(" ")
    return [first, *(" " + word for word in rest)]


def say(call: Call, choice: int) -> Iterable[Step]:
    """The usual script."""
    return words(f"Hello number {choice} from {call.model}.")


class FakeClient:
    """See the module's text; `calls` holds what was asked, newest last."""

    def __init__(
        self,
        script: Callable[[Call, int], Iterable[Step]] = say,
        *,
        cards: Sequence[ModelCard] | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        self.script = script
        self.cards = [card()] if cards is None else list(cards)
        self.report: dict[str, Any] = {} if report is None else report
        self.calls: list[Call] = []
        self.models_error: Exception | None = None
        self.was_closed = False

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[dict[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> FakeStream:
        """Open a scripted stream."""
        sampling = (sampling or SamplingParams()).replace(**settings)
        call = Call(self._card(model).name, prompt, messages, token_ids, sampling, timeout)
        self.calls.append(call)
        return FakeStream(self, call, self.script)

    async def generate(self, prompt: str | None = None, **rest: Any) -> Completion:
        """The whole of a scripted stream."""
        async with self.stream(prompt, **rest) as stream:
            return await stream.result()

    async def models(self) -> list[ModelCard]:
        """The cards."""
        if self.models_error is not None:
            raise self.models_error
        return list(self.cards)

    async def status(self) -> dict[str, Any]:
        """The report."""
        if self.models_error is not None:
            raise self.models_error
        return self.report

    async def text(self, model: str = "") -> FakeText:
        """The tokenizer, which knows its card."""
        if self.models_error is not None:
            raise self.models_error
        return FakeText(self._card(model))

    def _card(self, model: str) -> ModelCard:
        if not self.cards:
            raise UnavailableError("No worker group is ready yet; try again.", retry_after=2.0)
        if not model and len(self.cards) == 1:
            return self.cards[0]
        for each in self.cards:
            if each.name == model:
                return each
        names = ", ".join(each.name for each in self.cards)
        raise UnknownModelError(f"The broker serves no model named {model!r}; served now: {names}.", param="model")

    async def close(self) -> None:
        """Remember it."""
        self.was_closed = True


class FakeText:
    """A tokenizer whose ids are code points."""

    def __init__(self, its_card: ModelCard) -> None:
        self.card = its_card

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """A chat as `[role]content` one after another, up to where the assistant begins."""
        return self.encode("".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]")

    def decode(self, ids: Sequence[int]) -> str:
        """The text."""
        return "".join(chr(token) for token in ids if token < 0xD800)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids."""
        return [ord(letter) for letter in text]


class FakeStream:
    """One scripted stream; choices take turns."""

    prompt_tokens = 7

    def __init__(self, client: FakeClient, call: Call, script: Callable[[Call, int], Iterable[Step]]) -> None:
        self._client = client
        self._call = call
        self._choices = [iter(script(call, index)) for index in range(call.sampling.n)]
        self._texts = ["" for _ in self._choices]
        self._tokens: list[list[int]] = [[] for _ in self._choices]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in self._choices]
        self._reasons = ["" for _ in self._choices]
        self._deltas = self._run()

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._deltas.aclose()  # type: ignore[attr-defined]
        if self._call.ended == "running":
            self._call.ended = "closed"
        self._call.closed.set()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas

    async def result(self) -> Completion:
        """All of it."""
        async for _ in self._deltas:
            pass
        asked = self._call.sampling.logprobs is not None
        choices = tuple(
            Choice(
                index,
                self._texts[index],
                tuple(self._tokens[index]),
                self._reasons[index],
                tuple(self._logprobs[index]) if asked else None,
            )
            for index in range(len(self._choices))
        )
        usage = Usage(self.prompt_tokens, sum(map(len, self._tokens)), 3)
        return Completion("00" * 16, self._call.model, self.prompt_tokens, choices, usage)

    async def _run(self) -> AsyncIterator[Delta]:
        limit = self._call.sampling.max_tokens or 10_000
        left = dict(enumerate(self._choices))
        while left:
            for index, steps in list(left.items()):
                step = await self._next_text(steps)
                if step is None or len(self._tokens[index]) == limit:
                    del left[index]
                    self._reasons[index] = "length" if step is not None else "stop"
                    yield Delta(index, "", (), None, self._reasons[index])
                    continue
                await asyncio.sleep(0)
                token = sum(step.encode()) % 300
                self._texts[index] += step
                self._tokens[index].append(token)
                logprobs = self._logprob(step, token)
                self._logprobs[index] += logprobs or ()
                yield Delta(index, step, (token,), logprobs)
        self._call.ended = "finished"

    async def _next_text(self, steps: Any) -> str | None:
        for step in steps:
            if isinstance(step, str):
                return step
            if isinstance(step, Exception):
                self._call.ended = "failed"
                raise step
            await self._pause(step)
        return None

    async def _pause(self, step: float | threading.Event) -> None:
        """Wait; the event may be set in another thread, so it is looked at often instead of awaited."""
        waiting = isinstance(step, threading.Event)
        end = asyncio.get_running_loop().time() + (0 if waiting else step)
        while not step.is_set() if waiting else asyncio.get_running_loop().time() < end:
            if self._client.was_closed:
                self._call.ended = "failed"
                raise RequestCancelledError("The client was closed before the answer was complete.")
            await asyncio.sleep(0.005)

    def _logprob(self, text: str, token: int) -> tuple[TokenLogprob, ...] | None:
        asked = self._call.sampling.logprobs
        if asked is None:
            return None
        top = tuple(TopLogprob(f"{text}{rank}", rank, f"{text}{rank}".encode(), -1.0 - rank) for rank in range(asked))
        return (TokenLogprob(text, token, text.encode(), float("-inf") if text == "never" else -0.5, top),)
