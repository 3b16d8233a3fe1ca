"""An encoder-decoder: it reads a prompt, which is the source, and writes a text about it.

What the decoder sees of a source is computed once and lies in the pages of the cache, beside what it has written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from headrace.errors import InvalidRequestError, RequestError
from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.inputs import (
    check_cache,
    check_ids,
    check_rows,
    check_sources,
    check_states,
    real_tokens,
    refuse,
)
from headrace.workers.inference.kind import GeneratingKind
from headrace.workers.inference.padded import PaddedModel
from headrace.workers.inference.reader import Reader
from headrace.workers.inference.road import Road
from headrace.workers.inference.shell import CACHE_NAME, EncoderDecoderShell, encoder_decoder_output
from headrace.workers.inference.sources import Loaded
from headrace.workers.inference.text_replays import TextReplays

if TYPE_CHECKING:
    from headrace.workers.engine import Engine

__all__ = ["EncoderDecoder"]

_DECODER = "decoder_"


class EncoderDecoder(GeneratingKind):
    """A model such as a T5ForConditionalGeneration."""

    def __init__(self, loaded: Loaded, max_tokens: int, cuda_graphs: bool | None = None) -> None:
        super().__init__(loaded, max_tokens, cuda_graphs)
        model = loaded.model
        self.padded = PaddedModel(model, self.replays, max_tokens=max_tokens, prefix=_DECODER)
        road = Road(cuda_graphs, self.device, self._watch)
        self.text_replays = TextReplays(model, model.encoded, max_tokens=max_tokens, road=road)
        self._reader = Reader(self.text_replays.states, model.spec, max_tokens=max_tokens, device=self.device)
        self.shell = EncoderDecoderShell(loaded.config, loaded.generation_config, self.padded, self._reader)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: PagedCache | None = None,
        *,
        cache: PagedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits of a padded batch, as transformers' Seq2SeqLMOutput."""
        refuse(others)
        if decoder_input_ids is None:
            raise InvalidRequestError(
                "decoder_input_ids are missing; give what the decoder has written, which begins with the model's "
                "decoder_start_token_id, or call generate.",
                param="decoder_input_ids",
            )
        ids = check_ids(decoder_input_ids, self.padded.model.spec.vocab_size, prefix=_DECODER)
        given = past_key_values if cache is None else cache
        held = self.new_cache() if given is None else check_cache(given)
        begins = not held.source_lens
        states = self._states_of(input_ids, attention_mask, encoder_outputs, held)
        try:
            logits = self.padded.logits(ids, decoder_attention_mask, None, held, logits_to_keep)
        except RequestError:
            if begins:  # as it was
                held.reset()
            raise
        wanted = getattr(self.loaded.config, "use_cache", True) if use_cache is None else use_cache
        result = encoder_decoder_output(logits, held if wanted or given is not None else None, states)
        return result.to_tuple() if return_dict is False else result

    def generate(self, inputs: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """What `model.generate` of transformers returns for the same arguments."""
        refuse({name: kwargs.get(name) for name in ("inputs_embeds", "decoder_inputs_embeds")})
        self._start_token(kwargs)
        if inputs is not None:
            inputs, real = self._reader.check(inputs, mask)
            check_rows(real)
        if (given := kwargs.get("encoder_outputs")) is not None:
            states, _ = self._given(given, mask, inputs)
            # A new one, as the loop changes it.
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        elif inputs is None:
            raise InvalidRequestError("There is no prompt; give input_ids.", param="input_ids")
        if mask is not None:
            kwargs["attention_mask"] = mask.to(self.device)
        self._check_decoder(kwargs)
        return self.shell.generate(inputs, **kwargs)

    def start_engine(self) -> Engine:
        """A continuous-batching engine around the same weights."""
        from headrace.workers.inference.streams import make_engine

        config = self.shell.generation_config
        start = self._start_token({})
        if not isinstance(start, int):
            raise InvalidRequestError(
                f"decoder_start_token_id is {start!r}, but a stream begins with one token; set "
                "engine.generation_config.decoder_start_token_id to a number.",
                param="decoder_start_token_id",
            )
        return make_engine(self.loaded, config, self.max_tokens, start_token=start)

    def _states_of(
        self, input_ids: Tensor | None, mask: Tensor | None, encoder_outputs: Any, cache: PagedCache
    ) -> Tensor | None:
        """The encoder's states [B, S, hidden], which the cache has or gets; None if it has them and nobody asks."""
        if encoder_outputs is not None:
            states, real = self._given(encoder_outputs, mask, None)
        elif input_ids is not None:
            texts, packed = self._reader.read(input_ids, mask)
            states, real = texts.padded(packed), texts.real
        elif cache.source_lens:
            if mask is not None:
                rows, columns = cache.source_mask.shape
                check_sources(real_tokens(mask, (rows, columns)), cache)
            return None
        else:
            raise InvalidRequestError(
                "There is no source; give input_ids, or encoder_outputs, or the cache of an earlier call.",
                param="input_ids",
            )
        check_rows(real)
        if cache.source_lens:
            check_sources(real, cache)
        else:
            self.padded.remember(states, real, cache)
        return states

    def _given(self, encoder_outputs: Any, mask: Tensor | None, inputs: Tensor | None) -> tuple[Tensor, np.ndarray]:
        """States that the caller computed, and which of them are of tokens."""
        states = check_states(encoder_outputs, self.padded.model.spec.hidden_size).to(self.device, self.dtype)
        rows, columns, _ = states.shape
        if inputs is not None and tuple(inputs.shape) != (rows, columns):
            raise InvalidRequestError(
                f"encoder_outputs has states of {rows} rows of {columns} tokens, but input_ids has shape "
                f"{list(inputs.shape)}; leave one of them out.",
                param="encoder_outputs",
            )
        real = real_tokens(mask, (rows, columns))
        check_rows(real)
        return states, real

    def _check_decoder(self, kwargs: dict[str, Any]) -> None:
        """What the decoder is said to have written already, checked and moved to the device."""
        ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
        if ids is not None:
            ids = check_ids(ids, self.padded.model.spec.vocab_size, prefix=_DECODER)
            if kwargs.get(CACHE_NAME) is None:
                self.padded.check_prompt(ids, mask, None)
            kwargs["decoder_input_ids"] = ids.to(self.device)
        if mask is not None:
            kwargs["decoder_attention_mask"] = mask.to(self.device)

    def _start_token(self, kwargs: dict[str, Any]) -> Any:
        """What texts begin with: the argument, or what the configs say; looked for as transformers does."""
        places = (kwargs.get("generation_config"), self.shell.generation_config)
        for name in ("decoder_start_token_id", "bos_token_id"):
            for value in (kwargs.get(name), *(getattr(place, name, None) for place in places)):
                if value is not None:
                    return value
        raise InvalidRequestError(
            f"The {self.loaded.architecture} has no decoder_start_token_id, so nobody can tell what its texts begin "
            "with. Give decoder_start_token_id=, or set it in engine.generation_config; that of T5 is its "
            "pad_token_id, 0.",
            param="decoder_start_token_id",
        )
