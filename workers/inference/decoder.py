"""A decoder: it goes on with the text that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.inputs import check_cache, check_ids, refuse
from headrace.workers.inference.kind import GeneratingKind
from headrace.workers.inference.padded import PaddedModel
from headrace.workers.inference.shell import CACHE_NAME, DecoderShell, decoder_output
from headrace.workers.inference.sources import Loaded

if TYPE_CHECKING:
    from headrace.workers.engine import Engine

__all__ = ["Decoder"]


class Decoder(GeneratingKind):
    """A model such as a LlamaForCausalLM."""

    def __init__(self, loaded: Loaded, max_tokens: int, cuda_graphs: bool | None = None) -> None:
        super().__init__(loaded, max_tokens, cuda_graphs)
        self.padded = PaddedModel(loaded.model, self.replays, max_tokens=max_tokens)
        self.shell = DecoderShell(loaded.config, loaded.generation_config, self.padded)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PagedCache | None = None,
        *,
        cache: PagedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits of a padded batch, as transformers' CausalLMOutputWithPast."""
        refuse(others)
        ids = check_ids(input_ids, self.padded.model.spec.vocab_size)
        given = past_key_values if cache is None else cache
        held = self.new_cache() if given is None else check_cache(given)
        logits = self.padded.logits(ids, attention_mask, position_ids, held, logits_to_keep)
        wanted = getattr(self.loaded.config, "use_cache", True) if use_cache is None else use_cache
        result = decoder_output(logits, held if wanted or given is not None else None)
        return result.to_tuple() if return_dict is False else result

    def generate(self, inputs: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """What `model.generate` of transformers returns for the same arguments."""
        if inputs is not None:
            inputs = check_ids(inputs, self.padded.model.spec.vocab_size).to(self.device)
            if kwargs.get(CACHE_NAME) is None:
                self.padded.check_prompt(inputs, mask, kwargs.pop("position_ids", None))
        if mask is not None:
            kwargs["attention_mask"] = mask.to(self.device)
        return self.shell.generate(inputs, **kwargs)

    def start_engine(self) -> Engine:
        """A continuous-batching engine around the same weights."""
        from headrace.workers.inference.streams import make_engine

        return make_engine(self.loaded, self.shell.generation_config, self.max_tokens)
