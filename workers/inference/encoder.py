"""An encoder: it reads whole texts and writes none."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput

from headrace.kernels.model import Model
from headrace.workers.inference.inputs import refuse
from headrace.workers.inference.kind import Kind
from headrace.workers.inference.reader import Reader
from headrace.workers.inference.road import Road
from headrace.workers.inference.sources import Loaded
from headrace.workers.inference.tasks import put_under
from headrace.workers.inference.text_replays import TextReplays

__all__ = ["Encoder"]


class Encoder(Kind):
    """A model such as a BertModel, or one for a task, whose head is that of transformers."""

    def __init__(self, loaded: Loaded, max_tokens: int, cuda_graphs: bool | None = None) -> None:
        super().__init__(loaded, max_tokens)
        model = loaded.model
        road = Road(cuda_graphs, self.device, self._watch)
        self.text_replays = TextReplays(
            model, lambda batch: model.hidden(batch, None), max_tokens=max_tokens, road=road
        )
        reader = Reader(self.text_replays.states, model.spec, max_tokens=max_tokens, device=self.device)
        encoder = InjectedEncoder(model, reader)
        self._called: nn.Module = encoder
        if loaded.task is not None:
            self._called = self.module = put_under(loaded.task, encoder)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As InjectedEncoder, or as the task's class in transformers."""
        return self._called(*args, **kwargs)


class InjectedEncoder(nn.Module):
    """Called as the base model of transformers is called, by people and by the heads of tasks."""

    def __init__(self, model: Model, reader: Reader) -> None:
        super().__init__()
        self.model = model
        self._reader = reader

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits if the model fills masks, as transformers' MaskedLMOutput; otherwise last hidden states, and what
        the pooler makes of the first token of each text, as BaseModelOutputWithPoolingAndCrossAttentions."""
        refuse(others)
        texts, states = self._reader.read(
            input_ids, attention_mask, position_ids=position_ids, token_type_ids=token_type_ids
        )
        result: Any
        if self.model.head is not None:
            result = MaskedLMOutput(logits=texts.padded(self.model.logits(states)))
        else:
            pooled = self.model.pooled(texts.firsts(states)) if self.model.pooler is not None else None
            result = BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=texts.padded(states),
                pooler_output=None if pooled is None else texts.per_row(pooled),
            )
        return result.to_tuple() if return_dict is False else result
