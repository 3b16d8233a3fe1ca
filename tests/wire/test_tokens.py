"""Token ids on the wire: packed little-endian u32, on every machine."""

from __future__ import annotations

import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.messages import pack_tokens, unpack_tokens

ids = st.lists(st.integers(0, 2**32 - 1))


@given(ids)
def test_packing_keeps_every_id(tokens):
    assert list(unpack_tokens(pack_tokens(tokens))) == tokens
    assert len(pack_tokens(tokens)) == 4 * len(tokens)


@given(ids)
def test_the_bytes_are_little_endian(tokens):
    assert pack_tokens(tokens) == b"".join(token.to_bytes(4, "little") for token in tokens)


@given(ids)
def test_a_big_endian_machine_writes_and_reads_the_same_bytes(tokens):
    native, other = pack_tokens(tokens), ("big" if sys.byteorder == "little" else "little")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "byteorder", other)
        swapped = array("I", tokens)
        swapped.byteswap()
        assert pack_tokens(swapped) == native
        assert unpack_tokens(native) == swapped


def test_packing_takes_any_iterable_and_does_not_touch_it():
    tokens = array("I", [1, 2, 3])
    assert pack_tokens(tokens) == pack_tokens((1, 2, 3)) == pack_tokens(iter([1, 2, 3]))
    assert list(tokens) == [1, 2, 3]


@pytest.mark.parametrize("wrong", [[-1], [2**32]])
def test_what_is_no_u32_is_refused(wrong):
    with pytest.raises(OverflowError):
        pack_tokens(wrong)
