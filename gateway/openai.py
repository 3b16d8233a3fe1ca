"""OpenAI's request bodies as pydantic models: what is accepted, what is refused and by which field's name.

Values are only checked for their type here; ranges are `SamplingParams`' business, so that every way in has the same
limits and messages. A field we do not know is refused with its nearest match: ignoring a misspelt `temperatur` would
answer a question nobody asked. Fields that only concern the sender's bookkeeping are accepted and dropped.
"""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.errors import InvalidRequestError

__all__ = [
    "MAX_PROMPTS",
    "Body",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "GenerationBody",
    "Prompt",
    "StreamOptions",
    "TextPart",
]

MAX_PROMPTS = 256  # in one request; each is a stream of its own
MAX_MESSAGES = 4096

Prompt = str | list[int]


class Body(BaseModel):
    """Base of all: types are strict, unknown fields are refused by name, null means not given."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    # Accepted and dropped: they change nothing about the answer.
    harmless: ClassVar[frozenset[str]] = frozenset()
    # Known to OpenAI's clients, but not to us: field -> the values that ask for nothing.
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, field in value.items():
            if name in cls.model_fields:
                if field is not None:
                    _check_characters(name, field)
                    kept[name] = field
            elif name in cls.refused:
                if field is not None and field not in cls.refused[name]:
                    raise InvalidRequestError(f"{name} is not supported by this server; leave it out.", param=name)
            elif name not in cls.harmless:
                raise _unknown(name, cls)
        return kept


def _check_characters(name: str, value: Any) -> None:
    """JSON can hold half a surrogate pair, which no tokenizer takes: some programs cut texts inside an emoji."""
    for text in value if isinstance(value, list) else (value,):
        try:
            if isinstance(text, str):
                text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(
                f"{name} holds half a character (a surrogate without its pair); cut texts between characters.",
                param=name,
            ) from None


def _unknown(name: str, cls: type[Body]) -> InvalidRequestError:
    shown = repr(name[:100])
    near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "leave it out."
    return InvalidRequestError(f"The field {shown} is not known; {hint}", param=name[:100])


class TextPart(Body):
    """A typed part of a message; only text."""

    type: str
    text: str | None = None

    harmless = frozenset({"image_url", "input_audio", "file", "cache_control"})


class ChatMessage(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None

    harmless = frozenset({"name", "annotations"})
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": (),
        "audio": (),
    }

    def plain(self, index: int) -> dict[str, str]:
        """Role and text, as chat templates take them.

        Raises:
            InvalidRequestError: a part is no text, or the role needs tools.
        """
        where = f"messages[{index}]"
        if self.role in ("tool", "function"):
            raise InvalidRequestError(
                f"{where}.role is {self.role!r}, but tools are not supported.", param=f"{where}.role"
            )
        role = "system" if self.role == "developer" else self.role
        if self.content is None or isinstance(self.content, str):
            if self.content is None and role != "assistant":
                raise InvalidRequestError(f"{where}.content is missing; give text.", param=f"{where}.content")
            return {"role": role, "content": self.content or ""}
        texts = []
        for number, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    f"{where}.content[{number}] is of type {part.type[:50]!r}; this model reads only parts "
                    "of type 'text', with a field 'text'.",
                    param=f"{where}.content[{number}]",
                )
            texts.append(part.text)
        return {"role": role, "content": "\n".join(texts)}


class StreamOptions(Body):
    """What a stream tells besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False

    harmless = frozenset({"include_obfuscation"})


class GenerationBody(Body):
    """What chat and completions have in common: the sampling settings and vLLM's additions to them."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    harmless = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "parallel_tool_calls",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        }
    )
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,)}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream: true.", param="stream_options")
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the sender set; the model's own defaults fill the rest."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "n",
            "ignore_eos",
            "min_tokens",
            "max_tokens",
        )
        settings = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k == -1:  # vLLM's word for all
            settings["top_k"] = 0
        if self.seed is not None:
            settings["seed"] = self.seed % 2**64  # OpenAI allows negative ones
        if self.stop:
            settings["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids:
            settings["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.logit_bias:
            settings["logit_bias"] = {_token_id(token): bias for token, bias in self.logit_bias.items()}
        return settings


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise InvalidRequestError(f"logit_bias has the key {text[:40]!r}; give token ids.", param="logit_bias")
    return int(text)


_NO_TOOLS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}


class ChatRequest(GenerationBody):
    """Body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    # vLLM's pair of names for going on in the middle of the last message; neither makes sense without the other.
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = GenerationBody.refused | _NO_TOOLS

    def sampling(self) -> dict[str, Any]:
        """As the base says, with chat's own names for two of the fields."""
        settings = super().sampling()
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise InvalidRequestError(
                    "max_tokens and max_completion_tokens differ; give one of them.", param="max_completion_tokens"
                )
            _positive("max_completion_tokens", self.max_completion_tokens)
            settings["max_tokens"] = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed with logprobs: true.", param="top_logprobs")
        if self.logprobs:
            if not 0 <= (self.top_logprobs or 0) <= 20:
                raise InvalidRequestError(
                    f"top_logprobs is {self.top_logprobs}; give a whole number from 0 to 20.", param="top_logprobs"
                )
            settings["logprobs"] = self.top_logprobs or 0
        return settings

    def chat(self) -> list[dict[str, str]]:
        """The messages as roles and texts."""
        if self.add_generation_prompt not in (None, not self.continue_final_message):
            raise InvalidRequestError(
                "add_generation_prompt must be true, or false together with continue_final_message: true.",
                param="add_generation_prompt",
            )
        return [message.plain(index) for index, message in enumerate(self.messages)]


class CompletionRequest(GenerationBody):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = GenerationBody.refused | {"suffix": ("",)}

    def sampling(self) -> dict[str, Any]:
        """As the base says; OpenAI generates 16 tokens where nothing else is said."""
        settings = {"max_tokens": 16} | super().sampling()
        if self.logprobs is not None:
            if self.echo:
                raise InvalidRequestError(
                    "logprobs together with echo asks for log probabilities of the prompt, which this server does not "
                    "compute; leave one of them out.",
                    param="logprobs",
                )
            settings["logprobs"] = self.logprobs
        return settings

    def prompts(self) -> list[Prompt]:
        """The prompts, each a text or token ids.

        Raises:
            InvalidRequestError: there are none, too many, or an empty one.
        """
        given: Any = self.prompt
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts: list[Prompt] = [given] if single else given
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise InvalidRequestError(
                f"prompt holds {len(prompts)} prompts; give 1 to {MAX_PROMPTS} in one request.", param="prompt"
            )
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise InvalidRequestError("prompt is empty; give some text or token ids.", param="prompt")
            if isinstance(prompt, list) and not all(0 <= token < 2**31 for token in prompt):
                raise InvalidRequestError(f"prompt {index} holds a number that is no token id.", param="prompt")
        return prompts


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise InvalidRequestError(f"{name} is {value}; give a whole number from 1.", param=name)
