"""Hypothesis strategies for every message, built from the annotations of the dataclasses: a new field is covered."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from hypothesis import strategies as st

from headrace import messages

__all__ = ["MESSAGES", "bodies", "message", "plain"]

MESSAGES: tuple[type[Any], ...] = typing.get_args(messages.Message)

_INTEGERS = st.integers(-(2**63), 2**64 - 1)
_TEXT = st.text(max_size=12)
_BYTES = st.binary(max_size=24)
_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: _INTEGERS,
    str: _TEXT,
    bytes: _BYTES,
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
}


def plain() -> st.SearchStrategy[Any]:
    """What a field of type Any may hold."""
    leaf = st.none() | st.booleans() | _INTEGERS | st.floats(allow_nan=False) | _TEXT | _BYTES
    return st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=6
    )


def of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation."""
    if annotation is Any:
        return plain()
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if dataclasses.is_dataclass(annotation) or (isinstance(annotation, type) and issubclass(annotation, tuple)):
        hints = typing.get_type_hints(annotation)
        return st.builds(annotation, **{name: of(hint) for name, hint in hints.items()})
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return st.lists(of(args[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(of(args[0]), of(args[1]), max_size=3)
    if origin is list:
        return st.lists(of(args[0]), max_size=3)
    assert origin in (typing.Union, types.UnionType)
    return st.one_of(*(st.none() if arg is type(None) else of(arg) for arg in args))


def message() -> st.SearchStrategy[Any]:
    """Any message."""
    return st.sampled_from(MESSAGES).flatmap(of)


def bodies() -> st.SearchStrategy[bytes]:
    """Bytes that look a little like msgpack."""
    heads = st.sampled_from([bytes([b]) for b in range(0x80, 0xE0)])
    return st.lists(heads | st.binary(max_size=6), max_size=40).map(b"".join) | st.binary(max_size=200)
