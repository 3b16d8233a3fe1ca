"""What callers hand in, checked before anything is computed: token ids, masks, positions, caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.errors import InvalidRequestError
from headrace.workers.inference.cache import PagedCache

__all__ = ["check_cache", "check_ids", "check_positions", "real_tokens", "refuse"]

# Arguments of transformers' forward that would have to change something, and why they cannot.
_REFUSED = {
    "labels": "are for training; compute the loss from the logits",
    "inputs_embeds": "cannot be given, as the engine reads tokens; give input_ids",
    "output_attentions": "cannot be had, as fused attention never holds the weights; ask the transformers model",
    "output_hidden_states": "cannot be had from fused layers; ask the transformers model",
    "position_ids": "follow from attention_mask when generation goes on from a cache; leave them out",
    "token_type_ids": "mean nothing to a text generator; leave them out",
}


def check_ids(input_ids: object, vocab_size: int) -> Tensor:
    """Token ids [B, T], at least one.

    Raises:
        InvalidRequestError: they are no such thing, or one is beyond the vocabulary.
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.is_complex():
        kind = str(input_ids.dtype) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InvalidRequestError(f"input_ids is {kind}; give a tensor of token ids [rows, tokens].", param="input_ids")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise InvalidRequestError(
            f"input_ids has shape {list(input_ids.shape)}; give [rows, tokens] with at least one token.",
            param="input_ids",
        )
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise InvalidRequestError(
            f"input_ids holds {lowest if lowest < 0 else highest}, but the model has ids 0 to {vocab_size - 1}; use "
            "the model's own tokenizer.",
            param="input_ids",
        )
    return input_ids


def real_tokens(mask: Tensor | None, input_ids: Tensor, cache: PagedCache) -> np.ndarray:
    """Which of the new tokens [B, T] are real, told by a mask of them and all that came before.

    Raises:
        InvalidRequestError: the mask is not 0 and 1, has the wrong shape, or changes its mind about earlier tokens.
    """
    rows, columns = input_ids.shape
    if cache.lens and len(cache.lens) != rows:
        raise InvalidRequestError(
            f"input_ids has {rows} rows, but the cache has {len(cache.lens)}; give the same rows in the same order.",
            param="input_ids",
        )
    if mask is None:
        return np.ones((rows, columns), dtype=bool)
    past = cache.get_seq_length()
    if tuple(mask.shape) != (rows, past + columns):
        earlier = f" ({past} of them in the cache)" if past else ""
        raise InvalidRequestError(
            f"attention_mask has shape {list(mask.shape)}; give [{rows}, {past + columns}], a 0 for padding and a 1 "
            f"for every other token{earlier}.",
            param="attention_mask",
        )
    host = mask.detach().to("cpu")
    real = host != 0
    if bool((host[real] != 1).any()):
        raise InvalidRequestError(
            "attention_mask holds other values than 0 and 1; give 0 for padding and 1 for every other token.",
            param="attention_mask",
        )
    if past and not torch.equal(real[:, :past], cache.mask):
        raise InvalidRequestError(
            "attention_mask differs from the one by which the tokens in the cache were computed; start without a "
            "cache, or give the same mask with new columns.",
            param="attention_mask",
        )
    return real[:, past:].numpy()


def check_positions(position_ids: Tensor, real: np.ndarray, cache: PagedCache) -> None:
    """Positions follow from the mask: each real token counts one. Others are not possible.

    Raises:
        InvalidRequestError: others are given for real tokens.
    """
    given = position_ids.detach().to("cpu").numpy()
    before = np.array(cache.lens or [0] * len(real))
    expected = before[:, None] + real.cumsum(1) - 1
    if given.ndim != 2 or given.shape[1] != real.shape[1] or bool(((given != expected) & real).any()):
        raise InvalidRequestError(
            "position_ids are not those that follow from attention_mask (each real token counts one); leave them out, "
            "or give attention_mask too.",
            param="position_ids",
        )


def check_cache(cache: object) -> PagedCache:
    """A cache of ours; one of transformers has no pages.

    Raises:
        InvalidRequestError: it is something else.
    """
    if not isinstance(cache, PagedCache):
        raise InvalidRequestError(
            f"The cache is a {type(cache).__name__}; give the one of an earlier output, or that of engine.new_cache().",
            param="past_key_values",
        )
    return cache


def refuse(others: dict[str, Any]) -> None:
    """Refuse arguments that the engine does not know or cannot honour.

    Raises:
        InvalidRequestError: there is one; names it.
    """
    for name, value in others.items():
        if value is None or value is False:
            continue
        raise InvalidRequestError(f"{name} {_REFUSED.get(name, 'is not an argument of the engine')}.", param=name)
