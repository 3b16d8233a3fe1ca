"""What callers hand in, checked before anything is computed: token ids, masks, positions, segments, states, caches.

Encoder-decoders take two of most of these; `prefix` is "decoder_" for what belongs to the decoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.errors import InvalidRequestError
from headrace.workers.inference.cache import PagedCache

__all__ = [
    "check_cache",
    "check_ids",
    "check_positions",
    "check_rows",
    "check_sources",
    "check_states",
    "check_token_types",
    "real_tokens",
    "refuse",
]

# Arguments of transformers' forward that would have to change something, and why they cannot.
_REFUSED = {
    "labels": "are for training; compute the loss from the logits",
    "decoder_inputs_embeds": "cannot be given, as the engine reads tokens; give decoder_input_ids",
    "encoder_hidden_states": "are for a model that was made a decoder, which is not supported; leave them out",
    "inputs_embeds": "cannot be given, as the engine reads tokens; give input_ids",
    "output_attentions": "cannot be had, as fused attention never holds the weights; ask the transformers model",
    "output_hidden_states": "cannot be had from fused layers; ask the transformers model",
    "position_ids": "follow from attention_mask when generation goes on from a cache; leave them out",
    "token_type_ids": "mean nothing to a text generator; leave them out",
}


def check_ids(input_ids: object, vocab_size: int, *, prefix: str = "") -> Tensor:
    """Token ids [B, T], at least one.

    Raises:
        InvalidRequestError: they are no such thing, or one is beyond the vocabulary.
    """
    name = f"{prefix}input_ids"
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.is_complex():
        kind = str(input_ids.dtype) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InvalidRequestError(f"{name} is {kind}; give a tensor of token ids [rows, tokens].", param=name)
    if input_ids.ndim != 2 or not input_ids.numel():
        raise InvalidRequestError(
            f"{name} has shape {list(input_ids.shape)}; give [rows, tokens] with at least one token.", param=name
        )
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise InvalidRequestError(
            f"{name} holds {lowest if lowest < 0 else highest}, but the model has ids 0 to {vocab_size - 1}; use "
            "the model's own tokenizer.",
            param=name,
        )
    return input_ids


def real_tokens(
    mask: Tensor | None, shape: tuple[int, int], cache: PagedCache | None = None, *, prefix: str = ""
) -> np.ndarray:
    """Which of the new tokens [B, T] are real, told by a mask of them and all that came before.

    Raises:
        InvalidRequestError: the mask is not 0 and 1, has the wrong shape, or changes its mind about earlier tokens.
    """
    name = f"{prefix}attention_mask"
    rows, columns = shape
    if cache is not None and cache.lens and len(cache.lens) != rows:
        raise InvalidRequestError(
            f"{prefix}input_ids has {rows} rows, but the cache has {len(cache.lens)}; give the same rows in the same "
            "order.",
            param=f"{prefix}input_ids",
        )
    if mask is None:
        return np.ones((rows, columns), dtype=bool)
    if not isinstance(mask, Tensor):
        raise InvalidRequestError(f"{name} is {type(mask).__name__}; give a tensor like {prefix}input_ids.", param=name)
    past = 0 if cache is None else cache.get_seq_length()
    if tuple(mask.shape) != (rows, past + columns):
        earlier = f" ({past} of them in the cache)" if past else ""
        raise InvalidRequestError(
            f"{name} has shape {list(mask.shape)}; give [{rows}, {past + columns}], a 0 for padding and a 1 for every "
            f"other token{earlier}.",
            param=name,
        )
    host = mask.detach().to("cpu")
    real = host != 0
    if bool((host[real] != 1).any()):
        raise InvalidRequestError(
            f"{name} holds other values than 0 and 1; give 0 for padding and 1 for every other token.", param=name
        )
    if cache is not None and past and not torch.equal(real[:, :past], cache.mask):
        raise InvalidRequestError(
            f"{name} differs from the one by which the tokens in the cache were computed; start without a cache, or "
            "give the same mask with new columns.",
            param=name,
        )
    return real[:, past:].numpy()


def check_rows(real: np.ndarray, *, prefix: str = "") -> None:
    """Every row has a token.

    Raises:
        InvalidRequestError: one has none.
    """
    if len(empty := np.flatnonzero(~real.any(1))):
        raise InvalidRequestError(
            f"Row {empty[0]} of {prefix}attention_mask is all 0, so there is no text to go on from; drop the row.",
            param=f"{prefix}attention_mask",
        )


def check_positions(position_ids: Tensor, real: np.ndarray, cache: PagedCache | None = None, *, first: int = 0) -> None:
    """Positions follow from the mask: each real token counts one, from `first` on. Others are not possible.

    Raises:
        InvalidRequestError: others are given for real tokens.
    """
    given = position_ids.detach().to("cpu").numpy()
    before = np.array(cache.lens if cache is not None and cache.lens else [0] * len(real))
    expected = before[:, None] + real.cumsum(1) - 1 + first
    fits = given.shape in (real.shape, (1, real.shape[1]))
    if not fits or bool(((given != expected) & real).any()):
        raise InvalidRequestError(
            "position_ids are not those that follow from attention_mask (each real token counts one); leave them out, "
            "or give attention_mask too.",
            param="position_ids",
        )


def check_token_types(token_type_ids: object, shape: tuple[int, int], count: int) -> Tensor:
    """The segment of each token, [B, T].

    Raises:
        InvalidRequestError: they are no such thing, or the model tells fewer segments apart.
    """
    name = "token_type_ids"
    if not count:
        raise InvalidRequestError(
            f"{name} mean nothing to this model, which has no segments; leave them out.", param=name
        )
    if not isinstance(token_type_ids, Tensor) or token_type_ids.is_floating_point():
        raise InvalidRequestError(f"{name} is no tensor of whole numbers; give one like input_ids.", param=name)
    if tuple(token_type_ids.shape) not in (shape, (1, shape[1])):
        raise InvalidRequestError(
            f"{name} has shape {list(token_type_ids.shape)}; give that of input_ids, {list(shape)}.", param=name
        )
    lowest, highest = int(token_type_ids.min()), int(token_type_ids.max())
    if lowest < 0 or highest >= count:
        raise InvalidRequestError(
            f"{name} holds {lowest if lowest < 0 else highest}, but the model has segments 0 to {count - 1}; use the "
            "model's own tokenizer.",
            param=name,
        )
    return token_type_ids.expand(shape)


def check_states(encoder_outputs: Any, hidden_size: int) -> Tensor:
    """The states [B, S, hidden] of an encoder, out of what transformers hands around as its output.

    Raises:
        InvalidRequestError: they are no such thing.
    """
    states = getattr(encoder_outputs, "last_hidden_state", None)
    if states is None and isinstance(encoder_outputs, tuple | list) and encoder_outputs:
        states = encoder_outputs[0]
    if not isinstance(states, Tensor) or not states.is_floating_point():
        raise InvalidRequestError(
            f"encoder_outputs is {type(encoder_outputs).__name__} without states; give what the encoder returned, or "
            "BaseModelOutput(last_hidden_state=...).",
            param="encoder_outputs",
        )
    if states.ndim != 3 or states.shape[2] != hidden_size or not states.shape[0] * states.shape[1]:
        raise InvalidRequestError(
            f"encoder_outputs has states of shape {list(states.shape)}; give [rows, tokens, {hidden_size}].",
            param="encoder_outputs",
        )
    return states


def check_sources(real: np.ndarray, cache: PagedCache) -> None:
    """The sources are those that a cache has.

    Raises:
        InvalidRequestError: they have other rows, or other tokens are padding.
    """
    if real.shape != tuple(cache.source_mask.shape) or not np.array_equal(real, cache.source_mask.numpy()):
        raise InvalidRequestError(
            "The cache has keys and values of other sources: attention_mask differs from the one by which they were "
            "computed. Give the same rows in the same order, or start without a cache.",
            param="attention_mask",
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
