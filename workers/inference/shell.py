"""transformers' own generation loop around our model: sampling, beams, stops and streamers are those of transformers.

The shell is a PreTrainedModel without a layer. Generation asks it for logits and hands it the cache; nothing else of
transformers computes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from headrace.errors import InvalidRequestError
from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.inputs import check_cache, refuse
from headrace.workers.inference.padded import PaddedModel

__all__ = ["CACHE_NAME", "Shell", "output"]

# transformers 5.2x calls the cache `cache` where 5.17 calls it `past_key_values`.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"

# What the loop hands on to every forward although it means nothing there.
_PASSED_ON = ("assistant_tokenizer", "cache_position", "tokenizer")


def output(logits: Tensor, cache: PagedCache | None) -> Any:
    """Logits and cache as transformers returns them."""
    return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})


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
        return output(logits, held if use_cache or given is not None else None)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        self.padded.check_length(generation_config.max_length)
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

    @contextlib.contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield
