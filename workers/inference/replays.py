"""The decode steps of transformers' loop as CUDA graphs: made when a batch first needs them, kept for the next.

The graphs compute logits; what is chosen from them, and when a text ends, is the loop's business as ever. So whatever
that loop can do (sampling, beams, processors, criteria, streamers) it does with graphs as without.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.home import Home, Size
from headrace.workers.inference.road import Road

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["Replays"]

_FEWEST_TOKENS = 256  # a home for less would soon be too small
_ROWS = 8  # of which a home has a multiple, for they cost little


class Replays:
    """Homes for caches, one at a time; batches may come from several threads.

    Args:
        model: that decodes.
        max_tokens: most tokens of one text, its source included.
        road: says whether there may be graphs.

    Attributes:
        num_replays: steps computed by a graph.
    """

    def __init__(self, model: Model, *, max_tokens: int, road: Road) -> None:
        self.num_replays = 0
        self.road = road
        self._model = model
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._home: Home | None = None
        self._lodger: weakref.ref[PagedCache] | None = None

    @property
    def num_graphs(self) -> int:
        """Sizes of batches that have one."""
        return 0 if self._home is None else self._home.num_graphs

    def lodge(self, cache: PagedCache, rows: int, tokens: int, source_tokens: int = 0) -> None:
        """Give a cache a home with a graph for its batch, if there can be one.

        Args:
            cache: empty, or of earlier texts of the batch.
            rows: of the batch.
            tokens: most tokens of a text.
            source_tokens: of the longest source.

        Raises:
            ConfigError: there can be none, but graphs were insisted on.
        """
        with self._lock:
            if self.road.moved():
                self._drop_graphs()
            # A cache that was given may not fit its batch; that is found out later.
            size = Size.of(
                max(rows, len(cache.lens)),
                max((min(tokens, self._max_tokens), *cache.lens)),
                max((source_tokens, *cache.source_lens)),
            )
            if self.road.open():
                self.road.try_to(lambda: self._prepare(cache, size))

    def stay_away(self, why: str) -> None:
        """Note why a call has no use for graphs."""
        self.road.close(why)

    def logits(self, cache: PagedCache, tokens: Tensor) -> Tensor | None:
        """As `Home.logits`, also None if the cache has no home, or a graph would leave something out."""
        home = cache.home
        if home is None or not self.road.is_clear():
            return None
        logits = home.logits(cache, tokens)
        if logits is not None:
            self.num_replays += 1
        return logits

    def close(self) -> None:
        """Free graphs and memory; a cache that somebody still has keeps what is in it."""
        with self._lock:
            self._drop_graphs()
            self._home = self._lodger = None

    def _prepare(self, cache: PagedCache, size: Size) -> None:
        """Have a graph for such a batch, and its cache where the graph needs it."""
        fits = self._home is not None and self._home.size.holds(size)
        if not fits or cache.home is not self._home:
            self._evict()
        if not fits:
            self._find_home(size)
        assert self._home is not None
        self._home.capture(size.rows)
        if cache.home is not self._home:
            cache.move(self._home)
            self._lodger = weakref.ref(cache)

    def _find_home(self, size: Size) -> None:
        """One that holds all batches so far, and some that are larger; else one that is just large enough."""
        tokens = min(self._max_tokens, max(_FEWEST_TOKENS, 1 << (size.tokens - 1).bit_length()))
        roomy = Size(-(-size.rows // _ROWS) * _ROWS, tokens, size.blocks * tokens // size.tokens + size.rows)
        if self._home is not None:
            roomy = roomy.with_room_for(self._home.size)
        self._home = None  # before there is another
        try:
            self._home = Home(self._model, roomy)
        except torch.OutOfMemoryError:
            self._home = Home(self._model, size)

    def _evict(self) -> None:
        lodger = self._lodger() if self._lodger is not None else None
        if lodger is not None and lodger.home is self._home:
            lodger.move(None)
        self._lodger = None

    def _drop_graphs(self) -> None:
        if self._home is None:
            return
        lodger = self._lodger() if self._lodger is not None else None
        if lodger is None:
            self._home.drop_graphs()
        else:
            with lodger.lock:
                self._home.drop_graphs()
