"""Tokenizers and templates by content hash: fetched in parts, checked, kept while a model needs them."""

from __future__ import annotations

import hashlib

import pytest

from headrace.broker.blobs import MAX_BLOB, BlobStore, Download
from headrace.codec import BLOB_CHUNK
from headrace.errors import InvalidRequestError, ProtocolError
from headrace.messages import Blob, Drained, GetBlob
from tests.broker.world import PureGroup, World, card


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part(data: bytes, offset: int, size: int, *, total: int | None = None, hash: str | None = None) -> Blob:
    chunk = data[offset : offset + size]
    return Blob(hash=hash or sha(data), offset=offset, total=len(data) if total is None else total, data=chunk)


def test_a_blob_is_put_together_from_parts():
    data = bytes(range(250)) * 4
    download = Download(sha(data), 0.0)
    assert download.next_part == GetBlob(hash=sha(data), offset=0)
    assert download.take(part(data, 0, 600), 1.0) is None
    assert download.next_part.offset == 600
    assert download.take(part(data, 0, 600), 1.0) is None  # asked twice, answered twice
    assert download.take(part(b"other", 600, 5), 1.0) is None
    assert download.take(part(data, 600, 600), 2.0) == data
    assert download.asked_at == 2.0


def test_an_empty_blob_is_a_blob():
    assert Download(sha(b""), 0.0).take(part(b"", 0, 0), 0.0) == b""


@pytest.mark.parametrize(
    "wrong",
    [
        part(b"abc", 0, 3, total=2),
        part(b"abc", 0, 3, total=MAX_BLOB + 1),
        part(b"abc", 0, 0, total=3),
        part(b"xyz", 0, 3, hash=sha(b"abc")),
    ],
    ids=["more than all", "too large", "nothing of something", "other content"],
)
def test_parts_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ProtocolError, match="Blob"):
        Download(sha(b"abc"), 0.0).take(wrong, 0.0)


def test_the_store_answers_in_chunks_and_names_what_is_wrong():
    store, data = BlobStore(), bytes(BLOB_CHUNK + 5)
    store.add(sha(data), data)
    assert sha(data) in store
    first = store.part(GetBlob(hash=sha(data)))
    assert (len(first.data), first.total) == (BLOB_CHUNK, BLOB_CHUNK + 5)
    assert len(store.part(GetBlob(hash=sha(data), offset=BLOB_CHUNK)).data) == 5
    assert store.part(GetBlob(hash=sha(data), offset=BLOB_CHUNK + 5)).data == b""
    for question, param in (
        (GetBlob(hash="none"), "hash"),
        (GetBlob(hash=sha(data), offset=-1), "offset"),
        (GetBlob(hash=sha(data), offset=BLOB_CHUNK + 6), "offset"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            store.part(question)
        assert caught.value.param == param
    store.keep_only(["another"])
    assert sha(data) not in store


# ----------------------------------------------------------------------------------------------- in the whole core


def with_blobs(*blobs: bytes, **changes):
    return card(blobs={f"file{number}": sha(data) for number, data in enumerate(blobs)}, **changes)


def fetch(world, client, hash: str) -> bytes:
    data = b""
    while True:
        client.send(GetBlob(hash=hash, offset=len(data)))
        world.settle()
        answer = client.said[-1]
        assert isinstance(answer, Blob), answer
        data += answer.data
        if len(data) == answer.total:
            return data


def test_a_group_is_ready_once_the_broker_has_its_blobs():
    world = World()
    small, large = b"template", bytes(range(256)) * 9000
    group = PureGroup(world, "g0", model=with_blobs(small, large), blobs=(small, large)).start()
    assert world.broker.report(world.now)["groups"][0]["state"] == "loading"
    client = world.client()  # its Welcome is under way while the parts are
    world.settle()
    assert world.broker.report(world.now)["groups"][0]["state"] == "ready"
    assert fetch(world, client, sha(large)) == large
    assert fetch(world, client, sha(small)) == small
    group.send(Drained())
    group.alive = False
    for _ in range(7):
        world.tick(99.0)
    client.send(GetBlob(hash=sha(small)))
    world.settle()
    assert client.errors[-1].param == "hash"


def test_a_second_group_with_the_same_blobs_is_asked_for_none():
    world = World()
    data = bytes(5000)
    world.group("g0", model=with_blobs(data), blobs=(data,))
    second = PureGroup(world, "g1", model=with_blobs(data)).start()
    world.settle()
    assert world.broker.report(world.now)["models"][0]["ready_groups"] == 2
    assert second.welcomes == 1


def test_groups_that_load_at_once_are_all_ready_in_the_end():
    world = World()
    blobs = tuple(bytes([n]) * (BLOB_CHUNK + n) for n in range(3))
    for n in range(3):
        PureGroup(world, f"g{n}", model=with_blobs(*blobs), blobs=blobs).start()
    world.settle()
    assert world.broker.report(world.now)["models"][0]["ready_groups"] == 3


def test_a_question_that_was_not_answered_is_asked_again():
    world = World()
    data = b"x" * 100
    group = PureGroup(world, "g0", model=with_blobs(data), blobs=(data,)).start()
    group.inbox.clear()  # lost on its way
    world.settle()
    assert world.broker.report(world.now)["groups"][0]["state"] == "loading"
    world.wait(6.0)
    assert world.broker.report(world.now)["groups"][0]["state"] == "ready"


def test_a_group_with_wrong_content_is_told_and_not_used():
    world = World()
    data = b"what the card promises"
    group = PureGroup(world, "g0", model=with_blobs(data))
    group.blobs = {sha(data): b"something else altogether"}
    group.start()
    world.settle()
    assert [error.code for error in group.errors] == ["protocol_error"]
    assert world.broker.report(world.now)["groups"] == []


def test_a_group_that_dies_while_it_loads_leaves_nothing_behind():
    world = World()
    data = bytes(3 * BLOB_CHUNK)
    group = PureGroup(world, "g0", model=with_blobs(data), blobs=(data,)).start()
    group.die()
    world.wait(6.0)
    assert world.broker.report(world.now)["groups"] == []
