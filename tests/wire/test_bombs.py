"""Bodies made to hurt: each is refused with a typed error, in little time and memory."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from headrace.codec import MAX_ITEMS, decode
from headrace.errors import ProtocolError
from headrace.messages import BROKER_TO_CLIENT, CLIENT_TO_BROKER

LIMIT = 50 << 20


def array(count: int) -> bytes:
    return b"\xdd" + struct.pack(">I", count)


BOMBS = {
    "a megabyte of empty maps": array(1 << 20) + b"\x80" * (1 << 20),
    "a megabyte of empty lists in a field": b"\x81\xa8requests" + array(1 << 20) + b"\x90" * (1 << 20),
    "a hundred thousand lists in one another": b"\x91" * 100_000,
    "a thousand lists in one another": b"\x91" * 1000 + b"\xc0",
    "maps in one another": b"\x81\xa1x" * 50_000,
    "a length of four billion": b"\x81\xa8requests" + array(2**32 - 1),
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "bytes of four billion": b"\x81\xa8requests\xc6\xff\xff\xff\xff",
    "a string of four billion": b"\x81\xa8requests\xdb\xff\xff\xff\xff",
    "lists that claim their room before they are read": (b"\xdc" + struct.pack(">H", 14_000)) * 5000,
    "few of those, and little else": array(5000) * 1000,
    "long lists in one another": b"".join(array(MAX_ITEMS) + b"\xa2ab" * (MAX_ITEMS - 1) for _ in range(20)),
    "small maps without end": array(5_000_000) + b"\x81\xa1x\xc0" * 4_000_000,
    "an extension": b"\x81\xa8requests\xd4\x05\x00",
    "a timestamp, which msgpack would make an object of": b"\x81\xa8requests\xd6\xff\x00\x00\x00\x00",
    "an extension in a large body": b"\x81\xa8requests\x92"
    + b"\xc6"
    + struct.pack(">I", 1 << 20)
    + bytes(1 << 20)
    + b"\xd4\x05\x00",
    "a byte that means nothing": b"\x81\xa8requests\xc1",
    "numbers as names": b"\x82\x01\x02\x03\x04",
    "half a body": b"\x81\xa8requests\xc6" + struct.pack(">I", 1 << 21) + bytes(1 << 20),
    "two bodies": b"\x80" * 2,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_a_typed_error(name):
    with pytest.raises(ProtocolError, match=r"Submit|msgpack extension"):
        decode([b"Submit", BOMBS[name]], CLIENT_TO_BROKER)


def test_a_timestamp_deep_inside_a_free_field_is_refused():
    """Unpacking makes an object of it, past the refusal of extension types."""
    body = b"\x81\xa6limits\x81\xa1t\x91\xd6\xff\x00\x00\x00\x00"
    with pytest.raises(ProtocolError, match="limits holds a Timestamp"):
        decode([b"Welcome", body], BROKER_TO_CLIENT)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little_memory(name):
    """Counted is what was asked for, touched or not: the body is there already."""
    body = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([b"Submit", body], CLIENT_TO_BROKER)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LIMIT


def test_no_body_of_little_size_costs_much():
    """The worst of the bodies that are unpacked without a look at every value: as many headers as they may hold."""
    worst = 0
    for size in (1000, 5000, 20_000, 60_000):
        for headers in (16, 64, 256, 1000):
            body = ((b"\xdc" + struct.pack(">H", size)) * headers).ljust(size, b"\xc0")[:size]
            tracemalloc.start()
            with pytest.raises(ProtocolError):
                decode([b"Submit", body], CLIENT_TO_BROKER)
            worst = max(worst, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert worst < LIMIT
