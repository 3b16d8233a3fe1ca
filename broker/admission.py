"""Whether a request can be served at all: checked before it costs anything. Pure; the queue's bounds are in `room`."""

from __future__ import annotations

import hashlib

from headrace.broker.groups import Model
from headrace.broker.refusals import model_changed
from headrace.broker.requests import TOKEN_BYTES, Job
from headrace.card import ModelCard
from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.messages import Request, unpack_tokens
from headrace.sampling import SamplingParams
from headrace.tasks import EMBED, FILL_MASK, GENERATE, PoolingParams

__all__ = ["check", "check_id", "digest", "is_same", "quarantine_key"]

_MAX_FINGERPRINT = 256


def check_id(id: bytes) -> None:
    """Refuse ids that are not 16 bytes.

    Raises:
        InvalidRequestError: it has another length.
    """
    if len(id) != 16:
        raise InvalidRequestError(f"id has {len(id)} bytes; give 16 random ones.", param="id")


def digest(request: Request, model: str, sampling: SamplingParams) -> bytes:
    """Hash of what makes two submissions the same request.

    Seed and max_tokens are left out: a client that submits again after a restart fills in those it was told.
    """
    body = hashlib.sha256(f"{model}\0{request.task}\0{sampling.n}\0".encode())
    settings = {k: v for k, v in sampling.to_wire().items() if k not in ("seed", "max_tokens")}
    pooling = PoolingParams.from_wire(request.pooling).to_wire()
    body.update(repr((sorted(settings.items()), sorted(pooling.items()))).encode())
    body.update(request.prompt)
    return body.digest()


def is_same(request: Request, job: Job) -> bool:
    """Whether a submission under the id of a known job is that job.

    Raises:
        InvalidRequestError: a setting is out of range.
    """
    sampling = SamplingParams.from_wire(request.sampling)
    return (
        digest(request, request.model or job.model, sampling) == job.digest
        and sampling.seed in (None, job.seed)
        and sampling.max_tokens in (None, job.max_tokens)
        and len(request.output) in (0, len(job.streams))
    )


def quarantine_key(digest: bytes, max_tokens: int) -> bytes:
    """What a request that took groups down is remembered by: its content, whatever its id and seed."""
    return digest + max_tokens.to_bytes(4, "little")


def check(request: Request, model: Model) -> SamplingParams:
    """The settings in force, max_tokens resolved.

    Raises:
        InvalidRequestError: a value is missing or out of range; `param` names the field.
        ContextLengthError: prompt and output do not fit.
        ModelChangedError: the tokens so far came from other weights.
    """
    card = model.card
    sampling = SamplingParams.from_wire(request.sampling)
    _check_task(request, card)
    _check_tokens("prompt", request.prompt, card.vocab_size)
    if not request.prompt:
        raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
    for token in sampling.logit_bias:
        if token >= card.vocab_size:
            wanted = f"ids below {card.vocab_size}"
            raise InvalidRequestError(f"logit_bias names token {token}; this model has {wanted}.", param="logit_bias")
    if request.output and len(request.output) != sampling.n:
        raise InvalidRequestError(
            f"output holds {len(request.output)} choices but n is {sampling.n}; give one entry per choice.",
            param="output",
        )
    for output in request.output:
        # The numbers of a vector have no bound.
        _check_tokens("output", output, 2**32 if request.task == EMBED else card.vocab_size)
    if not 0 <= request.attempt < 2**31:
        raise InvalidRequestError(f"attempt is {request.attempt}; give a number from 0 to 2147483647.", param="attempt")
    if len(request.fingerprint) > _MAX_FINGERPRINT:
        raise InvalidRequestError("fingerprint is too long; send the one of the model's card.", param="fingerprint")
    present = {card.fingerprint, *(group.card.fingerprint for group in model.groups)}
    if any(request.output) and request.fingerprint and request.fingerprint not in present:
        raise model_changed(card.name)
    if request.task == GENERATE:
        return _resolve_length(request, model, sampling)
    return _resolve_items(request, model, sampling)


def _check_task(request: Request, card: ModelCard) -> None:
    if request.task not in card.tasks:
        raise InvalidRequestError(
            f"{card.name!r} was asked to {request.task[:40]!r}, but it can {' and '.join(card.tasks)}; name another "
            "model.",
            param="model",
        )


def _check_tokens(name: str, packed: bytes, vocab_size: int) -> None:
    if len(packed) % TOKEN_BYTES:
        message = f"{name} has {len(packed)} bytes, which is no whole number of 4-byte token ids."
        raise InvalidRequestError(message, param=name)
    if packed and (top := max(unpack_tokens(packed))) >= vocab_size:
        message = f"{name} holds token id {top}, but the model's ids end at {vocab_size - 1}; use its own tokenizer."
        raise InvalidRequestError(message, param=name)


def _resolve_length(request: Request, model: Model, sampling: SamplingParams) -> SamplingParams:
    prompt, context = len(request.prompt) // TOKEN_BYTES, model.context
    wanted = sampling.max_tokens
    if prompt + (wanted or 1) > context:
        asked = f" and max_tokens of {wanted:,}" if wanted else ""
        raise ContextLengthError(
            f"A prompt of {prompt:,} tokens{asked} does not fit the {context:,} tokens of {model.card.name!r}; "
            "shorten the prompt or ask for fewer tokens.",
            param="prompt" if prompt >= context else "max_tokens",
        )
    limit = wanted or context - prompt
    held = max((len(output) // TOKEN_BYTES for output in request.output), default=0)
    if held > limit:
        raise InvalidRequestError(f"output holds {held} tokens, more than the {limit} asked for.", param="output")
    # What the request says was checked already; a limit that it leaves to us must be, for min_tokens' sake.
    return sampling if wanted == limit else sampling.replace(max_tokens=limit)


def _resolve_items(request: Request, model: Model, sampling: SamplingParams) -> SamplingParams:
    """As `_resolve_length`, for a text that is read and not continued: how many items come is known beforehand."""
    tokens, context = len(request.prompt) // TOKEN_BYTES, model.context
    if tokens > context:
        raise ContextLengthError(
            f"A text of {tokens:,} tokens does not fit the {context:,} tokens of {model.card.name!r}; shorten it.",
            param="prompt",
        )
    if sampling.n != 1:
        raise InvalidRequestError(f"n is {sampling.n}, but {request.task} has one answer; leave n 1.", param="n")
    items = _num_masks(request, model.card) if request.task == FILL_MASK else _num_dimensions(request, model.card)
    if any(len(output) > items * TOKEN_BYTES for output in request.output):
        raise InvalidRequestError(f"output holds more than the {items} items that there are.", param="output")
    return sampling.replace(max_tokens=items)


def _num_masks(request: Request, card: ModelCard) -> int:
    """Mask tokens of the text, at least one."""
    masks = 0 if card.mask_token_id is None else unpack_tokens(request.prompt).count(card.mask_token_id)
    if not masks:
        raise InvalidRequestError(
            f"The text has no mask token ({card.special_tokens.get('mask_token', card.mask_token_id)}), so there is "
            "nothing to fill; put one where a word is missing.",
            param="prompt",
        )
    return masks


def _num_dimensions(request: Request, card: ModelCard) -> int:
    """Numbers of the vector that is asked for."""
    wanted = PoolingParams.from_wire(request.pooling).dimensions or card.embedding_size
    if wanted > card.embedding_size:
        raise InvalidRequestError(
            f"dimensions is {wanted}, but vectors of {card.name!r} have {card.embedding_size} numbers; ask for fewer.",
            param="dimensions",
        )
    return wanted
