"""transformers' own generation loop around our model: sampling, beams, stops and streamers are those of transformers.

A shell is a PreTrainedModel without a layer. Generation asks it for logits and hands it the cache; nothing else of
transformers computes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from headrace.errors import InvalidRequestError
from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.inputs import check_cache, check_sources, real_tokens, refuse
from headrace.workers.inference.padded import PaddedModel
from headrace.workers.inference.reader import Reader

__all__ = [
    "CACHE_NAME",
    "DecoderShell",
    "EncoderDecoderShell",
    "Shell",
    "decoder_output",
    "encoder_decoder_output",
]

# transformers 5.2x calls the cache `cache` where 5.17 calls it `past_key_values`.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"

# What the loop hands on to every forward although it means nothing there.
_PASSED_ON = ("assistant_tokenizer", "cache_position", "tokenizer")


def decoder_output(logits: Tensor, cache: PagedCache | None) -> Any:
    """Logits and cache as transformers returns them."""
    return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})


def encoder_decoder_output(logits: Tensor, cache: PagedCache | None, states: Tensor | None) -> Any:
    """Logits, cache and the encoder's states as transformers returns them."""
    return Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=states, **{CACHE_NAME: cache})


class Shell(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """What `generate` runs on.

    Args:
        config: of the model, as transformers has it.
        generation_config: defaults of `generate`; copied.
        padded: computes the logits.
    """

    main_input_name = "input_ids"

    def __init__(self, config: Any, generation_config: GenerationConfig, padded: PaddedModel) -> None:
        # That of PreTrainedModel prepares a model to be loaded; here there is none.
        nn.Module.__init__(self)
        self.config = config
        self.generation_config = copy.deepcopy(generation_config)
        self.generation_config.cache_implementation = None  # a hint for transformers' own caches
        self.padded = padded
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.padded.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.padded.dtype

    def can_generate(self) -> bool:
        """That is all it does."""
        return True

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        source_tokens = self._source_tokens(model_kwargs)
        self.padded.check_length(generation_config.max_length + source_tokens)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise InvalidRequestError(
                f"cache_implementation is {generation_config.cache_implementation!r}, but keys and values are always "
                "kept in pages here; leave it out.",
                param="cache_implementation",
            )
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            check_cache(given)._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = self.padded.new_cache(generation_config.max_length)
        else:
            self.padded.replays.stay_away("without a cache (use_cache) every step computes whole texts")
            return
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        self.padded.replays.lodge(
            model_kwargs[CACHE_NAME], batch_size * copies, generation_config.max_length, source_tokens
        )

    @contextlib.contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield

    def _source_tokens(self, model_kwargs: dict[str, Any]) -> int:
        """Of the longest source, if there are any."""
        return 0


class DecoderShell(Shell):
    """That of a decoder."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: PagedCache | None = None,
        past_key_values: PagedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """One step of generation."""
        refuse({name: value for name, value in others.items() if name not in _PASSED_ON})
        assert input_ids is not None, "generation from embeddings was refused"
        given = cache if cache is not None else past_key_values
        held = self.padded.new_cache() if given is None else given
        logits = self.padded.next_logits(input_ids, attention_mask, held, logits_to_keep)
        return decoder_output(logits, held if use_cache or given is not None else None)


class EncoderDecoderShell(Shell):
    """That of an encoder-decoder. The loop has the encoder read the prompts, and repeats its states for every beam; the
    cache gets each source once, and its rows share it."""

    def __init__(self, config: Any, generation_config: GenerationConfig, padded: PaddedModel, reader: Reader) -> None:
        super().__init__(config, generation_config, padded)
        self._source_encoder = _SourceEncoder(reader)

    def get_encoder(self, modality: str | None = None) -> _SourceEncoder:
        """What reads the prompts."""
        return self._source_encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: PagedCache | None = None,
        past_key_values: PagedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """One step of generation."""
        refuse({name: value for name, value in others.items() if name not in _PASSED_ON})
        assert decoder_input_ids is not None
        given = cache if cache is not None else past_key_values
        held = self.padded.new_cache() if given is None else given
        states = encoder_outputs.last_hidden_state
        if not held.source_lens:
            self.padded.remember(states, real_tokens(attention_mask, states.shape[:2]), held)
        logits = self.padded.next_logits(decoder_input_ids, decoder_attention_mask, held, logits_to_keep)
        return encoder_decoder_output(logits, held if use_cache or given is not None else None, states)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, *args, **kwargs)
        cache: PagedCache | None = model_kwargs.get(CACHE_NAME)
        if cache is None:
            return
        states, real = self._sources(model_kwargs)
        if cache.source_lens:
            check_sources(real, cache)
            return
        copies = len(states) // batch_size
        self.padded.remember(states[::copies], real[::copies], cache)
        cache.batch_repeat_interleave(copies)

    def _source_tokens(self, model_kwargs: dict[str, Any]) -> int:
        _, real = self._sources(model_kwargs)
        return int(real.sum(1).max())

    def _sources(self, model_kwargs: dict[str, Any]) -> tuple[Tensor, np.ndarray]:
        """The encoder's states [B, S, hidden], and which of them are of tokens."""
        states = model_kwargs["encoder_outputs"].last_hidden_state
        return states, real_tokens(model_kwargs.get("attention_mask"), states.shape[:2])


class _SourceEncoder:
    """A Reader in the form in which the loop calls an encoder."""

    main_input_name = "input_ids"

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The states of prompts."""
        refuse({"output_attentions": output_attentions, "output_hidden_states": output_hidden_states})
        texts, states = self._reader.read(input_ids, attention_mask)
        return BaseModelOutput(last_hidden_state=texts.padded(states))

    __call__ = forward
