"""Which blocks hold the KV of which tokens: a map from chained digests to block numbers, and who is evicted next.

A block's digest covers its tokens and, through its parent's digest, everything before it, so equal digests mean equal
text from the start of the sequence. Pure bookkeeping: it allocates nothing and knows no tensor.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["PrefixCache", "block_digest", "root_digest"]

_DIGEST_SIZE = 32


def root_digest(salt: bytes) -> bytes:
    """The parent of every first block: caches with different salts (models, tenants) share nothing."""
    return hashlib.blake2b(salt, digest_size=_DIGEST_SIZE, person=b"headrace-prefix").digest()


def block_digest(parent: bytes, tokens: bytes) -> bytes:
    """The digest of a full block, `tokens` being its ids as u32."""
    return hashlib.blake2b(parent + tokens, digest_size=_DIGEST_SIZE).digest()


class PrefixCache:
    """Published blocks by digest; those nobody uses are parked, least recently used first.

    Order comes from insertion alone, never from hashes of objects, so ranks that see the same calls agree.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        # Of a plain dict the first key is found behind the places of all that were taken before it, thousands at times.
        self._parked: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    @property
    def num_parked(self) -> int:
        """Published blocks nobody uses; they can be evicted."""
        return len(self._parked)

    def is_parked(self, block: int) -> bool:
        """Whether the block is published and unused."""
        return block in self._parked

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest published beginning of the chain."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Let others find a full, computed block; a digest that another block already has stays with that one."""
        assert block not in self._digest_of, f"block {block} is published already"
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def park(self, block: int) -> None:
        """The last user left: keep the content until the room is needed."""
        assert block in self._digest_of, f"block {block} was never published"
        assert block not in self._parked, f"block {block} is parked already"
        self._parked[block] = None

    def unpark(self, block: int) -> None:
        """The block is in use again."""
        del self._parked[block]

    def evict(self) -> int:
        """Forget the least recently used parked block and hand it over."""
        block, _ = self._parked.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block

    def validate(self) -> None:
        """Assert the invariants."""
        assert len(self._block_of) == len(self._digest_of)
        for block, digest in self._digest_of.items():
            assert self._block_of[digest] == block, f"block {block} is published under another's digest"
        for block in self._parked:
            assert block in self._digest_of, f"parked block {block} is not published"
