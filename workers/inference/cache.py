"""Keys and values of a padded batch in pages: what transformers' generation passes around as the cache.

Columns are tokens as the caller counts them, padding included; only real ones have keys and values. Rows share the
blocks of what they have in common (beams, copies of a prompt): a block is copied when one of its holders writes to it.
A row of an encoder-decoder also has a source, in blocks that are written once.
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from headrace.kernels.kv import KVCache
from headrace.kernels.spec import ModelSpec

if TYPE_CHECKING:
    from headrace.workers.inference.home import Home

__all__ = ["PagedCache"]

BLOCK_SIZE = 16
_FIRST_BLOCKS = 4  # per row, when nobody said how long texts get


class PagedCache(Cache):  # type: ignore[misc]
    """A growing cache for one batch; `InferenceEngine.new_cache` makes one.

    Attributes:
        lens: real tokens of each row.
        mask: [rows, columns] bool on the host, which columns are real.
        tables: blocks of each row, in order.
        source_lens: real tokens of each row's source; empty if there are no sources.
        source_mask: [rows, columns] bool on the host, which columns of the sources are real.
        source_tables: blocks of each row's source, in order.
        kv: the tensors; None until the first tokens come.
        lock: held by whoever writes to it, or moves it out of its home.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        expected_tokens: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._expected_tokens = expected_tokens
        self.lock = threading.RLock()
        self.reset()

    @property
    def home(self) -> Home | None:
        """Where the tensors belong, with graphs that compute what is next; None if they are the cache's own."""
        return None if self._home is None else self._home()

    def reset(self) -> None:
        """Forget everything, and free the memory."""
        self._home: weakref.ref[Home] | None = None  # which has the model, and that is not the cache's to keep
        self.kv: KVCache | None = None
        self.lens: list[int] = []
        self.tables: list[list[int]] = []
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.source_lens: list[int] = []
        self.source_tables: list[list[int]] = []
        self.source_mask = torch.zeros(0, 0, dtype=torch.bool)
        self._holders: list[int] = []
        self._free: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        other = PagedCache(self._spec, dtype=self._dtype, device=self._device, expected_tokens=self._expected_tokens)
        with self.lock:
            for name, value in vars(self).items():
                if name not in ("_home", "lock", "_spec"):
                    setattr(other, name, copy.deepcopy(value, memo))
        return other

    # ------------------------------------------------------------------------------------- what transformers asks for

    def __repr__(self) -> str:
        return f"PagedCache(rows={len(self.lens)}, columns={self.mask.shape[1]}, blocks={self.num_held})"

    def __len__(self) -> int:
        return len(self._spec.layers)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens."""
        return len(self.lens) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether there is anything in it."""
        return self.kv is not None

    @property
    def is_sliding(self) -> list[bool]:
        """Nothing is dropped, also where layers see a window only."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """All layers attend."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """All layers have keys and values of their own."""
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self.mask.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """There is no longest text but the engine's."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask for so many more tokens has, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Keys and values are written by the engine's own layers, never by those of transformers."""
        raise TypeError("A headrace cache works with the engine that made it; give other models a cache of their own.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows, side by side."""
        self.batch_select_indices(torch.arange(len(self.lens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by numbers or by a mask, in that order; a row may be kept several times."""
        chosen = torch.arange(len(self.lens))[indices.to("cpu")]
        rows: list[int] = chosen.tolist()
        with self.lock:
            self.mask = self.mask[chosen]
            self.lens = [self.lens[row] for row in rows]
            self.tables = self._chosen(self.tables, rows)
            if self.source_lens:
                self.source_mask = self.source_mask[chosen]
                self.source_lens = [self.source_lens[row] for row in rows]
                self.source_tables = self._chosen(self.source_tables, rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove so many columns, given as a negative number; a positive one says how many to keep."""
        columns = self.mask.shape[1]
        keep = columns + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, columns)
        with self.lock:
            self.mask = self.mask[:, : max(0, keep)]
            self.lens = [int(length) for length in self.mask.sum(1)]
            for row, length in enumerate(self.lens):
                needed = _num_blocks(length)
                self._release(self.tables[row][needed:])
                self.tables[row] = self.tables[row][:needed]  # another list, as its home counts on lists that only grow

    # --------------------------------------------------------------------------------------- what the engine asks for

    @property
    def num_held(self) -> int:
        """Blocks in use."""
        return sum(holders > 0 for holders in self._holders)

    def add_sources(self, real: Tensor) -> KVCache:
        """Make room for what each row's text is about, before there is any text.

        Args:
            real: [rows, columns] bool on the host.

        Returns:
            The tensors to write to, at the slots that `source_tables` name.
        """
        assert not self.lens, "sources come first"
        self._begin(len(real))
        self.source_mask = real
        self.source_lens = real.sum(1).tolist()
        wanted = [_num_blocks(length) for length in self.source_lens]
        kv = self._with_room(sum(wanted))
        self.source_tables = [[self._take() for _ in range(count)] for count in wanted]
        return kv

    def extend(self, new: Tensor) -> KVCache:
        """Add columns, and make room for the real tokens among them.

        Args:
            new: [rows, columns] bool on the host; the first ones decide how many rows there are.

        Returns:
            The tensors to write to, at the slots that `tables` name.
        """
        if not self.lens:
            self._begin(len(new))
        counts: list[int] = new.sum(1).tolist()
        kv = self._with_room(self._num_wanted(counts))
        copies: list[tuple[int, int]] = []
        for row, count in enumerate(counts):
            length = self.lens[row]
            if count and length % BLOCK_SIZE and self._holders[self.tables[row][-1]] > 1:
                copies.append((self.tables[row][-1], self._own_copy(row)))
            missing = _num_blocks(length + count) - len(self.tables[row])
            self.tables[row] += [self._take() for _ in range(missing)]
            self.lens[row] = length + count
        self.mask = torch.cat((self.mask, new), dim=1)
        if copies:
            self._copy(copies, kv, kv)
        return kv

    def move(self, home: Home | None) -> None:
        """Move to a home that nobody lives in, which has room for it; or, None, into tensors of its own."""
        with self.lock:
            if self.kv is not None:
                held = [block for block, holders in enumerate(self._holders) if holders]
                total = max(1, len(held)) if home is None else home.num_blocks
                kv = self._new_kv(total) if home is None else home.kv
                self._copy(list(zip(held, range(len(held)), strict=True)), self.kv, kv)
                index_of = {block: index for index, block in enumerate(held)}
                self.tables = [[index_of[block] for block in table] for table in self.tables]
                self.source_tables = [[index_of[block] for block in table] for table in self.source_tables]
                self._holders = [self._holders[block] for block in held] + [0] * (total - len(held))
                self._free = list(range(len(held), total))
                self.kv = kv
            self._home = None if home is None else weakref.ref(home)

    def validate(self) -> None:
        """Assert the invariants; tests call it after every call."""
        counted = [0] * len(self._holders)
        assert len(self.source_lens) in (0, len(self.lens)), "some rows have a source, others have none"
        for lens, masks, tables in (
            (self.lens, self.mask, self.tables),
            (self.source_lens, self.source_mask, self.source_tables),
        ):
            for length, mask, table in zip(lens, masks, tables, strict=True):
                assert len(table) == _num_blocks(length), "a row has too many or too few blocks"
                assert int(mask.sum()) == length, "a row's length is not that of its mask"
                for block in table:
                    counted[block] += 1
        assert counted == self._holders, "holders differ from the rows' tables"
        assert sorted(self._free) == [block for block, count in enumerate(counted) if not count], "blocks leaked"

    def _begin(self, rows: int) -> None:
        """Have so many rows, without a token."""
        self.lens = [0] * rows
        self.tables = [[] for _ in self.lens]
        self.mask = self.mask.new_zeros(rows, 0)

    def _with_room(self, wanted: int) -> KVCache:
        """The tensors, with so many free blocks."""
        home = self.home
        if self.kv is None and home is not None and wanted <= home.num_blocks:
            self.kv = home.kv
            self._holders, self._free = [0] * home.num_blocks, list(range(home.num_blocks))
        if self.kv is not None and wanted <= len(self._free):
            return self.kv
        if home is not None:
            self.move(None)
        per_row = _FIRST_BLOCKS if self._expected_tokens is None else _num_blocks(self._expected_tokens)
        total = max(
            2 * len(self._holders), self.num_held + wanted, self._num_source_blocks() + per_row * len(self.lens)
        )
        old, self.kv = self.kv, self._new_kv(total)
        if old is not None:
            used = len(self._holders) * BLOCK_SIZE
            for layer in range(len(self)):
                for new, was in zip(self.kv.layer(layer), old.layer(layer), strict=True):
                    new[:used] = was[:used]
        self._free += range(len(self._holders), total)
        self._holders += [0] * (total - len(self._holders))
        return self.kv

    def _new_kv(self, num_blocks: int) -> KVCache:
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
            return KVCache(self._spec, num_blocks, BLOCK_SIZE, self._dtype, self._device)

    def _num_wanted(self, counts: list[int]) -> int:
        """Blocks that so many more tokens of each row take, copies of those that are shared included."""
        wanted = 0
        left: dict[int, int] = {}  # holders of blocks that would be copied, but for the last
        for table, length, count in zip(self.tables, self.lens, counts, strict=True):
            wanted += _num_blocks(length + count) - len(table)
            if count and length % BLOCK_SIZE and left.setdefault(table[-1], self._holders[table[-1]]) > 1:
                left[table[-1]] -= 1
                wanted += 1
        return wanted

    def _num_source_blocks(self) -> int:
        return sum(map(_num_blocks, self.source_lens))

    def _chosen(self, tables: list[list[int]], rows: list[int]) -> list[list[int]]:
        """The tables of chosen rows; what nobody holds any more is free."""
        chosen = [list(tables[row]) for row in rows]
        for table in chosen:
            for block in table:
                self._holders[block] += 1
        for table in tables:
            self._release(table)
        return chosen

    def _take(self) -> int:
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def _own_copy(self, row: int) -> int:
        """Exchange a row's last block, which others hold too, for one of its own."""
        *others, shared = self.tables[row]
        self._release([shared])
        self.tables[row] = [*others, self._take()]
        return self.tables[row][-1]

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def _copy(self, pairs: list[tuple[int, int]], old: KVCache, new: KVCache) -> None:
        sources, targets = torch.tensor(pairs, dtype=torch.int64, device=self._device).view(-1, 2).T
        for layer in range(len(self)):
            for was, becomes in zip(old.layer(layer), new.layer(layer), strict=True):
                blocks_of = (-1, BLOCK_SIZE, *was.shape[1:])
                becomes.view(blocks_of)[targets] = was.view(blocks_of)[sources]


def _num_blocks(length: int) -> int:
    return -(-length // BLOCK_SIZE)
