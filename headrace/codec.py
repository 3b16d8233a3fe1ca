"""Messages to frames and back: `[kind][msgpack map]`, typed and bounded. No pickle, no extension types.

`encode` and `decode` are driven by the annotations of the dataclasses in `headrace.messages`, read once. Decoding is
strict where it protects us (kinds of the other direction, wrong types, missing fields, sizes) and lenient where it lets
versions meet: fields it does not know are ignored, absent fields with a default take it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import msgpack

from headrace.errors import ProtocolError
from headrace.messages import Message

__all__ = ["BLOB_CHUNK", "MAX_BODY", "MAX_ITEMS", "decode", "encode"]

MAX_BODY = 16 << 20  # bytes of one frame, either direction
MAX_ITEMS = 1 << 18  # entries of all lists and maps of a message together: a bomb of empty maps costs 70 bytes each
BLOB_CHUNK = 1 << 20  # bytes of a blob in one message

_Reader = Callable[[Any, str], Any]


def encode(message: Message) -> list[bytes]:
    """The frames of a message.

    Raises:
        ProtocolError: the message is larger than a peer will take.
    """
    body = _packer().pack(_plain(message))
    if len(body) > MAX_BODY:
        raise ProtocolError(
            f"A {type(message).__name__} message of {len(body):,} bytes exceeds the limit of {MAX_BODY:,}; send less at once."
        )
    return [type(message).__name__.encode(), body]


def decode(frames: Sequence[bytes], allowed: tuple[type[Any], ...]) -> Any:
    """The message in `frames`, one of the kinds in `allowed`.

    Raises:
        ProtocolError: wrong number of frames, unknown kind, malformed or oversized body, missing or mistyped field.
    """
    if len(frames) != 2:
        raise ProtocolError(f"A message has 2 frames, this one has {len(frames)}.")
    kind, body = frames
    cls = _kinds(allowed).get(bytes(kind[:32]))
    if cls is None:
        known = ", ".join(sorted(c.__name__ for c in allowed))
        raise ProtocolError(f"Unknown message kind {bytes(kind[:32])!r}; expected one of {known}.")
    if len(body) > MAX_BODY:
        raise ProtocolError(f"A {cls.__name__} body of {len(body):,} bytes exceeds the limit of {MAX_BODY:,}.")
    return _reader(cls)(_unpack(body, cls.__name__), cls.__name__)


def _unpack(body: bytes, name: str) -> Any:
    budget = MAX_ITEMS

    def count(items: Any) -> Any:
        nonlocal budget
        budget -= len(items) + 1
        if budget < 0:
            raise ProtocolError(f"A {name} body has more than {MAX_ITEMS:,} entries.")
        return items

    try:
        return msgpack.unpackb(
            body,
            list_hook=count,
            object_hook=count,
            ext_hook=_refuse_ext,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=4096,
        )
    except ProtocolError:
        raise
    except Exception as error:
        raise ProtocolError(f"A {name} body is not valid msgpack: {type(error).__name__}: {error}.") from error


def _refuse_ext(code: int, data: bytes) -> None:
    raise ProtocolError(f"msgpack extension type {code} is not part of the protocol.")


@cache
def _packer() -> msgpack.Packer:
    return msgpack.Packer(autoreset=True)


@cache
def _kinds(allowed: tuple[type[Any], ...]) -> dict[bytes, type[Any]]:
    return {cls.__name__.encode(): cls for cls in allowed}


@cache
def _field_names(cls: type[Any]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


def _plain(value: Any) -> Any:
    """Dataclasses become maps; a tuple of dataclasses a list of maps; the rest msgpack packs as it is."""
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _field_names(type(value))}
    if type(value) is tuple and value and dataclasses.is_dataclass(value[0]):
        return [_plain(item) for item in value]
    return value


@cache
def _reader(annotation: Any) -> _Reader:
    """A function that checks a decoded value against an annotation and builds what it names."""
    if annotation is Any:
        return lambda value, where: value
    if dataclasses.is_dataclass(annotation):
        return _dataclass_reader(annotation)
    if isinstance(annotation, type) and issubclass(annotation, tuple):
        return _named_tuple_reader(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return _tuple_reader(_reader(args[0]))
    if origin is dict:
        return _dict_reader(args)
    if origin in (typing.Union, types.UnionType):
        inner = _reader(next(arg for arg in args if arg is not type(None)))
        return lambda value, where: None if value is None else inner(value, where)
    return _scalar_reader(origin or annotation)


def _scalar_reader(wanted: type[Any]) -> _Reader:
    def read(value: Any, where: str) -> Any:
        # bool is an int to Python, not to the wire.
        if type(value) is wanted:
            return value
        if wanted is float and type(value) is int:
            return float(value)
        raise ProtocolError(f"{where} must be {wanted.__name__}, not {type(value).__name__}.")

    return read


def _tuple_reader(item: _Reader) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise ProtocolError(f"{where} must be a list, not {type(value).__name__}.")
        return tuple([item(entry, where) for entry in value])

    return read


def _dict_reader(args: tuple[Any, ...]) -> _Reader:
    read_key, read_value = _reader(args[0]), _reader(args[1])

    def read(value: Any, where: str) -> Any:
        if type(value) is not dict:
            raise ProtocolError(f"{where} must be a map, not {type(value).__name__}.")
        return {read_key(k, where): read_value(v, where) for k, v in value.items()}

    return read


def _named_tuple_reader(cls: type[Any]) -> _Reader:
    hints = typing.get_type_hints(cls)
    readers = [_reader(hints[name]) for name in cls._fields]
    scalars = tuple(_reader_type(hints[name]) for name in cls._fields)
    size = len(readers)

    def read(value: Any, where: str) -> Any:
        if type(value) is not list or len(value) < size:
            raise ProtocolError(f"{where} must hold lists of {size} values ({', '.join(cls._fields)}).")
        # The hot path: hundreds of thousands of token runs a second, nearly always of exactly these types.
        if tuple(map(type, value)) == scalars:
            return cls._make(value)
        return cls._make(r(v, f"{where}.{n}") for r, v, n in zip(readers, value, cls._fields, strict=False))

    return read


def _reader_type(annotation: Any) -> Any:
    """The exact type that needs no further check; for an optional field that is its absence."""
    if isinstance(annotation, type):
        return annotation
    return type(None) if type(None) in typing.get_args(annotation) else None


def _dataclass_reader(cls: type[Any]) -> _Reader:
    hints = typing.get_type_hints(cls)
    readers = {f.name: _reader(hints[f.name]) for f in dataclasses.fields(cls)}
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }

    def read(value: Any, where: str) -> Any:
        if type(value) is not dict:
            raise ProtocolError(f"{where} must be a map, not {type(value).__name__}.")
        if missing := required - value.keys():
            raise ProtocolError(f"{where} lacks {', '.join(sorted(missing))}.")
        return cls(**{name: readers[name](v, f"{where}.{name}") for name, v in value.items() if name in readers})

    return read
