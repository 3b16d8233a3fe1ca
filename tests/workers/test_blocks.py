"""Blocks are handed out once, shared by content, and evicted only when nobody holds them."""

from __future__ import annotations

import pytest

from headrace.workers.blocks import BlockManager
from headrace.workers.prefix_cache import PrefixCache


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(4, PrefixCache())


def test_all_blocks_are_handed_out_once(manager: BlockManager):
    blocks = manager.allocate(4)
    assert sorted(blocks) == [0, 1, 2, 3]
    assert manager.num_available == 0
    manager.validate([blocks])
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 available"):
        manager.allocate(1)


def test_released_blocks_without_content_are_free_again(manager: BlockManager):
    manager.release(manager.allocate(3))
    assert manager.num_available == 4
    manager.validate([])


def test_a_shared_block_stays_until_its_last_holder_leaves(manager: BlockManager):
    first = manager.allocate(2)
    manager.publish(first[0], b"a")
    shared = manager.match([b"a", b"b"])
    assert shared == first[:1]
    assert manager.num_unheld(shared) == 0
    manager.share(shared)
    manager.release(first)
    manager.validate([shared])
    assert manager.num_available == 3
    manager.release(shared)
    assert manager.num_available == 4
    assert manager.match([b"a"]) == shared, "the content outlives its holders"
    assert manager.num_unheld(shared) == 1


def test_the_least_recently_used_content_is_evicted_first_and_endings_before_beginnings(manager: BlockManager):
    old, new = manager.allocate(2), manager.allocate(2)
    for blocks, digests in ((old, [b"a", b"ab"]), (new, [b"x", b"xy"])):
        for block, digest in zip(blocks, digests, strict=True):
            manager.publish(block, digest)
    manager.release(old)
    manager.release(new)
    manager.share(manager.match([b"a"]))  # used again
    manager.release(manager.match([b"a"]))
    evicted = [block for _ in range(4) for block in manager.allocate(1)]
    assert evicted == [old[1], new[1], new[0], old[0]]
    manager.validate([evicted])


def test_free_blocks_are_taken_before_cached_ones(manager: BlockManager):
    blocks = manager.allocate(1)
    manager.publish(blocks[0], b"a")
    manager.release(blocks)
    held = manager.allocate(3)
    assert blocks[0] not in held
    assert manager.match([b"a"]) == blocks


def test_a_digest_stays_with_the_block_that_published_it_first(manager: BlockManager):
    first, second = manager.allocate(2)
    manager.publish(first, b"a")
    manager.publish(second, b"a")
    assert manager.match([b"a"]) == [first]
    manager.release([first, second])
    manager.validate([])


def test_without_a_cache_nothing_is_found():
    manager = BlockManager(2)
    blocks = manager.allocate(2)
    manager.publish(blocks[0], b"a")
    manager.release(blocks)
    assert manager.match([b"a"]) == []
    assert manager.num_available == 2
    manager.validate([])


def test_misuse_is_caught(manager: BlockManager):
    blocks = manager.allocate(1)
    with pytest.raises(AssertionError, match="has no content to share"):
        manager.share(blocks)
    with pytest.raises(AssertionError, match="differ"):
        manager.validate([])
    manager.release(blocks)
    with pytest.raises(AssertionError, match="is not held"):
        manager.release(blocks)
