"""What an engine asks of its model, of whatever kind: one that reads, one that writes, or one that does both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headrace.kernels.kv import KVCache
from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.padded import PaddedModel
from headrace.workers.inference.replays import Replays
from headrace.workers.inference.road import Road
from headrace.workers.inference.shell import Shell
from headrace.workers.inference.sources import Loaded
from headrace.workers.inference.text_replays import TextReplays
from headrace.workers.inference.watch import Watch

if TYPE_CHECKING:
    from headrace.workers.engine import Engine

__all__ = ["GeneratingKind", "Kind"]


class Kind(ABC):
    """A model, used as transformers uses its own of this kind.

    Attributes:
        loaded: the model and what belongs to it.
        max_tokens: most tokens of one text.
        module: what one prints to see the blocks.
        device: where it is.
        dtype: of its weights.
        text_replays: graphs of whole texts, if it reads any.
    """

    text_replays: TextReplays | None = None

    def __init__(self, loaded: Loaded, max_tokens: int) -> None:
        weight = loaded.model.embedding.weight
        assert isinstance(weight, Tensor)
        self.loaded = loaded
        self.max_tokens = max_tokens
        self.module: nn.Module = loaded.model
        self.device = weight.device
        self.dtype = weight.dtype
        self._watch = Watch(loaded.model)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's class in transformers returns; arguments as there."""

    def look(self) -> None:
        """Notice what its owner changed of the model since the last call."""
        self._watch.look()

    def close(self) -> None:
        """Free the graphs, and what caches of theirs take."""
        if self.text_replays is not None:
            self.text_replays.close()

    def cache_bytes(self, tokens: int) -> int:
        """Memory that the cache of so many tokens takes."""
        return 0


class GeneratingKind(Kind):
    """A model that writes.

    Args:
        loaded: as for a Kind.
        max_tokens: likewise.
        cuda_graphs: the setting.

    Attributes:
        padded: computes its logits.
        shell: transformers' generation loop around it.
        replays: graphs of that loop's steps.
        stream_road: whether streams take graphs.
    """

    padded: PaddedModel
    shell: Shell

    def __init__(self, loaded: Loaded, max_tokens: int, cuda_graphs: bool | None = None) -> None:
        super().__init__(loaded, max_tokens)
        road = Road(cuda_graphs, self.device, self._watch)
        self.replays = Replays(loaded.model, max_tokens=max_tokens, road=road)
        self.stream_road = Road(cuda_graphs, self.device, self._watch)

    @abstractmethod
    def generate(self, inputs: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """What `model.generate` of transformers returns for the same arguments."""

    @abstractmethod
    def start_engine(self) -> Engine:
        """A continuous-batching engine around the same weights."""

    def close(self) -> None:
        """Free the graphs, and what caches of theirs take."""
        super().close()
        self.replays.close()

    def new_cache(self) -> PagedCache:
        """An empty cache."""
        return self.padded.new_cache()

    def cache_bytes(self, tokens: int) -> int:
        """Memory that the cache of so many tokens takes."""
        return KVCache.bytes_per_block(self.padded.model.spec, tokens, self.dtype)
