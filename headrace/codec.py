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
from operator import attrgetter
from typing import Any

import msgpack

from headrace.errors import ProtocolError
from headrace.messages import Message

__all__ = ["BLOB_CHUNK", "MAX_BODY", "MAX_ITEMS", "decode", "encode"]

MAX_BODY = 16 << 20  # bytes of one frame, either direction
MAX_ITEMS = 1 << 18  # values in a message, of all depths together: a bomb of empty maps costs 70 bytes each
BLOB_CHUNK = 1 << 20  # bytes of a blob in one message

_MAX_DEPTH = 16
_UNSEEN = 64 << 10  # bytes that can hold no bomb worth the name
_UNSEEN_SLOTS = 4 << 20  # array slots of 8 bytes that nested headers may claim

_PLAIN_TYPES = frozenset({str, int, float, bool, bytes, type(None)})

_Reader = Callable[[Any, str], Any]
_Writer = Callable[[Any], Any]


def encode(message: Message) -> list[bytes]:
    """The frames of a message.

    Raises:
        ProtocolError: the message is larger than a peer will take, or holds what msgpack cannot say.
    """
    kind: Any = type(message)
    try:
        body = _packer().pack(_writer(kind)(message))
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"A {type(message).__name__} message cannot be written: {error}.") from error
    if len(body) > MAX_BODY:
        raise ProtocolError(
            f"A {type(message).__name__} message of {len(body):,} bytes exceeds the limit of {MAX_BODY:,}; send less."
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
    # msgpack sets arrays up before it reads them, so nested headers cost memory whether or not their values follow. To
    # look at every value is dear, so a small body goes without if it holds few bytes that could be such headers.
    if len(body) > _UNSEEN or (body.count(b"\xdc") + body.count(b"\xdd")) * len(body) > _UNSEEN_SLOTS:
        _survey(body, name)
    try:
        return msgpack.unpackb(body, ext_hook=_refuse_ext, strict_map_key=True)
    except ProtocolError:
        raise
    except Exception as error:
        raise ProtocolError(f"A {name} body is not valid msgpack: {type(error).__name__}: {error}.") from error


def _survey(body: bytes, name: str) -> None:
    """Walk over a body without building anything; refuse it if it holds more or deeper values than a message may."""
    left = 1  # values to come at this depth
    outer: list[int] = []  # and at those around it
    count = position = 0
    try:
        while left or outer:
            if not left:
                left = outer.pop()
                continue
            left -= 1
            count += 1
            head = body[position]
            width, children, length = _HEADS[head]
            position += 1
            if width:  # what follows is a size
                size = int.from_bytes(body[position : position + width], "big")
                position += width
                children, length = children * size, length * size
            position += length
            if children:
                outer.append(left)
                left = children
            if count + left > MAX_ITEMS:
                raise ProtocolError(f"A {name} body has more than {MAX_ITEMS:,} entries.")
            if len(outer) > _MAX_DEPTH or head in _NEVER:
                raise ProtocolError(f"A {name} body is nested too deeply or holds types that no message has.")
    except IndexError:
        raise ProtocolError(f"A {name} body ends too early.") from None


def _heads() -> list[tuple[int, int, int]]:
    """By first byte of a value: bytes of its size, values and bytes that follow (or that many per unit of the size)."""
    heads = [(0, 0, 0)] * 256
    for n in range(16):
        heads[0x80 + n], heads[0x90 + n] = (0, 2 * n, 0), (0, n, 0)
    for n in range(32):
        heads[0xA0 + n] = (0, 0, n)
    for power in range(3):
        heads[0xC4 + power] = heads[0xD9 + power] = (1 << power, 0, 1)  # bin, str
    for power in range(4):
        heads[0xCC + power] = heads[0xD0 + power] = (0, 0, 1 << power)  # unsigned, signed
    heads[0xCA], heads[0xCB] = (0, 0, 4), (0, 0, 8)  # float
    heads[0xDC], heads[0xDD], heads[0xDE], heads[0xDF] = (2, 1, 0), (4, 1, 0), (2, 2, 0), (4, 2, 0)  # array, map
    return heads


_HEADS = _heads()
_NEVER = frozenset({0xC1, 0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)})  # unused, extension types


def _refuse_ext(code: int, data: bytes) -> None:
    raise ProtocolError(f"msgpack extension type {code} is not part of the protocol.")


@cache
def _packer() -> msgpack.Packer:
    return msgpack.Packer(autoreset=True)


@cache
def _kinds(allowed: tuple[type[Any], ...]) -> dict[bytes, Any]:
    return {cls.__name__.encode(): cls for cls in allowed}


@cache
def _writer(cls: Any) -> _Writer:
    """A function that makes a map of a dataclass, whose fields are looked at once and not with every message."""
    hints = typing.get_type_hints(cls)
    names = tuple(f.name for f in dataclasses.fields(cls))
    nested = {name: write for name in names if (write := _field_writer(hints[name])) is not None}
    values = attrgetter(*names) if len(names) > 1 else lambda message: [getattr(message, name) for name in names]

    def write_map(message: Any) -> dict[str, Any]:
        fields = dict(zip(names, values(message), strict=True))
        for name, write in nested.items():
            fields[name] = write(fields[name])
        return fields

    return write_map


def _field_writer(annotation: Any) -> _Writer | None:
    """How a field is written that holds a dataclass or a tuple of them; None for what msgpack packs as it is."""
    many = typing.get_origin(annotation) is tuple
    item: Any = typing.get_args(annotation)[0] if many else annotation
    if not hasattr(item, "__dataclass_fields__"):
        return None
    write = _writer(item)
    return (lambda values: [write(value) for value in values]) if many else write


@cache
def _reader(annotation: Any) -> _Reader:
    """A function that checks a decoded value against an annotation and builds what it names."""
    if annotation is Any:
        return _read_any
    if isinstance(annotation, type):
        if dataclasses.is_dataclass(annotation):
            return _dataclass_reader(annotation)
        if issubclass(annotation, tuple):
            return _named_tuple_reader(annotation)
        return _scalar_reader(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return _tuple_reader(_reader(args[0]))
    if origin is dict:
        return _dict_reader(args)
    if origin in (typing.Union, types.UnionType):
        inner = _reader(next(arg for arg in args if arg is not type(None)))
        return lambda value, where: None if value is None else inner(value, where)
    assert isinstance(origin, type)  # list[Any]: its entries are checked by who uses them
    return _scalar_reader(origin)


def _read_any(value: Any, where: str) -> Any:
    """Whatever msgpack itself can say: it makes objects of timestamps, past our refusal of extensions."""
    if type(value) is list:
        for entry in value:
            _read_any(entry, where)
    elif type(value) is dict:
        for entry in value.values():
            _read_any(entry, where)
    elif type(value) not in _PLAIN_TYPES:
        raise ProtocolError(f"{where} holds a {type(value).__name__}, which is not part of the protocol.")
    return value


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
    scalars = {name: hints[name] for name in readers if hints[name] in _PLAIN_TYPES}
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
        fields = {}
        for name, v in value.items():
            if type(v) is scalars.get(name):
                fields[name] = v
            elif name in readers:
                fields[name] = readers[name](v, f"{where}.{name}")
        return cls(**fields)

    return read
