"""What of a model is served as the settings are: how long texts may be, how much is cached, how answers begin."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from headrace.card import ModelCard
from headrace.errors import ConfigError, ModelFilesError
from headrace.kernels.kv import KVCache
from headrace.workers.config import EngineConfig
from headrace.workers.memory import default_kv_blocks

if TYPE_CHECKING:
    from headrace.kernels.model import Model
    from headrace.kernels.spec import ModelSpec

__all__ = ["largest_id", "model_len", "num_blocks", "start_token_of"]


def start_token_of(spec: ModelSpec, card: ModelCard, given: int | None) -> int | None:
    """What an encoder-decoder's texts begin with, given or by its config; None for a decoder.

    Raises:
        ModelFilesError: nobody says, or it is no token.
    """
    if spec.encoder is None:
        return None
    start = spec.encoder.start_token if given is None else given
    if isinstance(start, int) and 0 <= start < card.vocab_size:
        return start
    raise ModelFilesError(
        f"{card.name}, a {card.architecture}, has {'no' if start is None else repr(start) + ' as its'} "
        f"decoder_start_token_id, so nobody can tell what its answers begin with. Put a token id below "
        f"{card.vocab_size} into its generation_config.json; that of T5 is its pad_token_id: "
        '"decoder_start_token_id": 0.',
        param="model",
    )


def model_len(card: ModelCard, config: EngineConfig) -> int:
    """Most tokens of one text, prompt and output together.

    Raises:
        ConfigError: the settings ask for more than the model was made for.
    """
    if config.max_model_len is None:
        return card.max_model_len
    if config.max_model_len > card.max_model_len:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but {card.name} was made for {card.max_model_len} tokens; "
            "lower it or leave it out.",
            param="max_model_len",
        )
    return config.max_model_len


def largest_id(ids: Iterable[int]) -> int:
    """The largest of some token ids, 0 if there are none; of a prompt without making an object of each."""
    if isinstance(ids, array):
        return int(np.frombuffer(ids, np.uint32).max(initial=0))
    return max(ids, default=0)


def num_blocks(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Blocks of the KV cache: as many as the settings say, or as there is room for."""
    if config.kv_tokens is not None:
        return config.kv_tokens // config.block_size
    parameter = next(model.parameters())
    return default_kv_blocks(
        parameter.device,
        bytes_per_block=KVCache.bytes_per_block(model.spec, config.block_size, parameter.dtype),
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
    )
