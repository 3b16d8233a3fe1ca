"""Blocks of KV memory: who holds which, counted; numbers only, the tensors are elsewhere.

Every block is in exactly one of three states:

    free    no content worth keeping
    parked  unused, but its content is published in the prefix cache; evicted when no block is free
    held    by one or more sequences; never handed out
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.workers.prefix_cache import PrefixCache

__all__ = ["BlockManager"]


class BlockManager:
    """Hands out blocks and takes them back; `cache` is None when nothing is to be shared."""

    def __init__(self, num_blocks: int, cache: PrefixCache | None = None) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._cache = cache
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm in the CPU's cache

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out."""
        return len(self._free) + (0 if self._cache is None else self._cache.num_parked)

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached beginning; nothing is taken yet."""
        return [] if self._cache is None else self._cache.match(digests)

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody holds: taking them lowers `num_available` by that many."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold published blocks, together with whoever holds them already."""
        assert self._cache is not None
        for block in blocks:
            assert block in self._cache, f"block {block} has no content to share"
            if self._holders[block] == 0:
                self._cache.unpark(block)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks of no content, evicting parked ones if need be; the caller checked `num_available`."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        kept = len(self._free) - min(count, len(self._free))
        blocks = self._free[kept:][::-1]
        del self._free[kept:]
        if missing := count - len(blocks):
            assert self._cache is not None
            blocks += [self._cache.evict() for _ in range(missing)]
        for block in blocks:
            assert self._holders[block] == 0, f"block {block} is in use"
            self._holders[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give up a sequence's blocks; the deepest goes first, so that beginnings outlive endings."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is not held"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._cache is not None and block in self._cache:
                self._cache.park(block)
            else:
                self._free.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a computed block findable, unless it is already."""
        assert self._holders[block] > 0, f"block {block} is not held"
        if self._cache is not None and block not in self._cache:
            self._cache.publish(block, digest)

    def validate(self, tables: Iterable[list[int]]) -> None:
        """Assert the invariants, `tables` being the blocks of every sequence that holds any."""
        counted = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a sequence holds a block twice"
            for block in table:
                counted[block] += 1
        assert counted == self._holders, "holders differ from the sequences' tables"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        for block in self._free:
            assert self._holders[block] == 0, f"free block {block} is held"
            assert self._cache is None or block not in self._cache, f"free block {block} is published"
        num_held = sum(count > 0 for count in self._holders)
        assert num_held + self.num_available == self.num_blocks, "blocks leaked"
        if self._cache is not None:
            self._cache.validate()
            for block in range(self.num_blocks):
                assert not (self._cache.is_parked(block) and self._holders[block]), f"held block {block} is parked"
