"""The codec: what goes in comes out, what is not ours is refused by name, and what is ours and newer is let through."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import msgpack
import pytest
from hypothesis import given

from headrace import codec, messages
from headrace.codec import MAX_BODY, decode, encode
from headrace.errors import ProtocolError
from headrace.messages import (
    BROKER_TO_CLIENT,
    BROKER_TO_LEADER,
    CLIENT_TO_BROKER,
    LEADER_TO_BROKER,
    Assign,
    Assignment,
    Blob,
    Finish,
    GroupHello,
    Hello,
    Ping,
    Refusal,
    Refused,
    Request,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
)
from tests.wire import strategies

FACES = (CLIENT_TO_BROKER, BROKER_TO_CLIENT, LEADER_TO_BROKER, BROKER_TO_LEADER)


def frames(kind: type, body: object) -> list[bytes]:
    return [kind.__name__.encode(), msgpack.packb(body)]


@given(strategies.message())
def test_every_message_survives_the_wire(message):
    assert decode(encode(message), (type(message),)) == message


def test_every_message_goes_in_some_direction():
    assert {kind for face in FACES for kind in face} == set(strategies.MESSAGES)


@pytest.mark.parametrize("kind", strategies.MESSAGES, ids=lambda kind: kind.__name__)
def test_messages_are_frozen_and_keyword_only(kind):
    assert kind.__dataclass_params__.frozen
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(kind).parameters.values())
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "face"),
    [(kind, face) for face in FACES for kind in strategies.MESSAGES if kind not in face],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_wrong_direction_is_refused(kind, face):
    with pytest.raises(ProtocolError, match=f"Unknown message kind b'{kind.__name__}'"):
        decode(frames(kind, {}), face)


def test_unknown_kinds_are_refused_and_the_known_ones_named():
    with pytest.raises(ProtocolError, match=r"b'Bogus'; expected one of .*Hello.*Submit"):
        decode([b"Bogus", b"\x80"], CLIENT_TO_BROKER)


def test_a_long_kind_is_not_repeated_in_full():
    with pytest.raises(ProtocolError) as caught:
        decode([b"x" * 100_000, b"\x80"], CLIENT_TO_BROKER)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("count", [0, 1, 3, 5001])
def test_a_message_has_two_frames(count):
    with pytest.raises(ProtocolError, match="2 frames"):
        decode([b"Ping"] * count, CLIENT_TO_BROKER)


# ------------------------------------------------------------------------------------------- versions that meet


@given(strategies.message(), strategies.plain())
def test_fields_of_a_newer_version_are_ignored(message, value):
    kind, body = encode(message)
    newer = {**msgpack.unpackb(body), "brand_new_field": value}
    assert decode([kind, msgpack.packb(newer)], (type(message),)) == message


def test_a_longer_tuple_of_a_newer_version_is_cut():
    run = [b"r", 0, 1, 5, b"abcd", None, "new"]
    (decoded,) = decode(frames(Tokens, {"runs": [run]}), LEADER_TO_BROKER).runs
    assert decoded == TokenRun(b"r", 0, 1, 5, b"abcd", None)


def test_absent_fields_take_their_default():
    assert decode(frames(Hello, {}), CLIENT_TO_BROKER) == Hello()
    body = {"requests": [{"id": b"i", "model": "", "prompt": b""}]}
    assert decode(frames(Submit, body), CLIENT_TO_BROKER).requests == (Request(id=b"i", model="", prompt=b""),)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", strategies.MESSAGES, ids=lambda kind: kind.__name__)
def test_a_missing_field_is_named(kind):
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            with pytest.raises(ProtocolError, match=rf"{kind.__name__} lacks .*\b{field.name}\b"):
                decode(frames(kind, {}), (kind,))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Ping, "nonce", "1"),
        (Ping, "nonce", True),
        (Ping, "nonce", 1.0),
        (Ping, "nonce", None),
        (Hello, "name", b"bytes"),
        (Hello, "version", [1]),
        (Submit, "requests", {}),
        (Submit, "requests", None),
        (Submit, "requests", [[]]),
        (Submit, "requests", ["x"]),
        (Assign, "assignments", [{"request": b"r", "choice": "0", "attempt": 1, "prompt": b""}]),
        (Welcome, "limits", []),
        (Welcome, "limits", {b"key": 1}),
        (Tokens, "runs", [[b"r", 0, 1, 5, b"abcd"]]),
        (Tokens, "runs", [["r", 0, 1, 5, b"abcd", None]]),
        (Tokens, "runs", [[b"r", 0, 1, 5, "abcd", None]]),
        (Tokens, "runs", [[b"r", 0, 1, 5, b"abcd", {}]]),
        (Tokens, "runs", [[b"r", False, 1, 5, b"abcd", None]]),
        (Tokens, "runs", [7]),
        (Refused, "refusals", [[b"r", 0, 1, "error"]]),
    ],
    ids=str,
)
def test_a_mistyped_field_is_named(kind, field, value):
    with pytest.raises(ProtocolError, match=rf"{kind.__name__}\.{field}"):
        decode(frames(kind, {field: value}), (kind,))


def test_a_whole_number_may_stand_for_a_float_but_not_the_reverse():
    body = {"group": "g", "card": 1, "max_num_seqs": 1, "kv_tokens": 1}
    with pytest.raises(ProtocolError, match=r"GroupHello\.card must be a map"):
        decode(frames(GroupHello, body), LEADER_TO_BROKER)
    refusal = decode(frames(Refused, {"refusals": [[b"r", 0, 1, {"retry_after": 1}]]}), LEADER_TO_BROKER)
    assert refusal.refusals == (Refusal(b"r", 0, 1, {"retry_after": 1}),)


@given(strategies.bodies())
def test_any_bytes_are_a_message_or_a_protocol_error(body):
    for kind in (Submit, Tokens, Welcome, GroupHello):
        try:
            message = decode([kind.__name__.encode(), body], (kind,))
        except ProtocolError:
            continue
        assert type(message) is kind


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81", b"\xc0", b"\x01", b"\x90", b"\x80\x80", b"\x81\x01\x02"])
def test_bodies_that_are_no_map(body):
    with pytest.raises(ProtocolError, match="Ping"):
        decode([b"Ping", body], CLIENT_TO_BROKER)


# ------------------------------------------------------------------------------------------- sizes


def test_a_body_over_the_limit_is_refused_on_both_sides():
    with pytest.raises(ProtocolError, match="exceeds the limit of"):
        encode(Blob(hash="h", offset=0, total=1, data=bytes(MAX_BODY)))
    with pytest.raises(ProtocolError, match="exceeds the limit of"):
        decode([b"Ping", bytes(MAX_BODY + 1)], CLIENT_TO_BROKER)


def test_a_full_blob_chunk_fits():
    blob = Blob(hash="h" * 64, offset=1 << 30, total=1 << 31, data=bytes(codec.BLOB_CHUNK))
    assert decode(encode(blob), BROKER_TO_CLIENT) == blob


def test_what_msgpack_cannot_say_is_a_protocol_error():
    """A number of more than 64 bits once ended the broker's loop."""
    for wrong in (2**64, object()):
        with pytest.raises(ProtocolError, match="Pong message cannot be written"):
            encode(messages.Pong(nonce=wrong))
    assert decode(encode(messages.Pong(nonce=5)), BROKER_TO_CLIENT).nonce == 5


def test_long_honest_messages_pass():
    """The look at every value of a large body must not refuse what a large body is for."""
    prompt = messages.pack_tokens(range(200_000))
    bias = [[token, 0.5] for token in range(1024)]
    request = Request(id=b"i" * 16, model="m", prompt=prompt, sampling={"logit_bias": bias, "max_tokens": 5})
    assert decode(encode(Submit(requests=(request,) * 12)), CLIENT_TO_BROKER).requests == (request,) * 12
    assignment = Assignment(request=b"i" * 16, choice=0, attempt=1, prompt=prompt, output=prompt)
    assert decode(encode(Assign(assignments=(assignment,))), BROKER_TO_LEADER).assignments == (assignment,)
    logprobs = [[-0.25, [[token, -0.125] for token in range(20)]]]
    runs = tuple(TokenRun(b"i" * 16, choice, 1, 7, b"abcd", logprobs) for choice in range(1024))
    assert decode(encode(Tokens(runs=runs, step=9)), LEADER_TO_BROKER).runs == runs


def test_every_kind_of_value_survives_the_look_at_large_bodies():
    values = [
        None,
        True,
        False,
        0,
        127,
        128,
        2**16,
        2**32,
        2**63,
        -1,
        -33,
        -(2**15),
        -(2**31),
        -(2**62),
        1.5,
        "",
        "é" * 40,
    ]
    values += ["x" * 300, "x" * 70_000, b"", b"x" * 300, b"x" * 70_000, [], {}, [1] * 20, list(range(70_000)), [[[[]]]]]
    values += [{str(n): n for n in range(n)} for n in (1, 20, 300)]
    status = messages.Status(report={"values": values})
    assert decode(encode(status), BROKER_TO_CLIENT) == status


def test_exports_are_pinned():
    assert codec.__all__ == ["BLOB_CHUNK", "MAX_BODY", "MAX_ITEMS", "decode", "encode"]
    public = {name for name in vars(messages) if isinstance(vars(messages)[name], type) and not name.startswith("_")}
    ours = {name for name in public if vars(messages)[name].__module__ == messages.__name__}
    constants = {"PROTOCOL_VERSION", "Message", "pack_tokens", "unpack_tokens"}
    faces = {"CLIENT_TO_BROKER", "BROKER_TO_CLIENT", "LEADER_TO_BROKER", "BROKER_TO_LEADER"}
    assert set(messages.__all__) == ours | constants | faces
    assert messages.PROTOCOL_VERSION == 1


def test_finishes_and_runs_start_with_the_name_of_a_stream():
    """The broker's hot path reads the first three values as one."""
    for parts in (TokenRun, Finish, Refusal):
        hints = list(typing.get_type_hints(parts))
        assert hints[:3] == ["request", "choice", "attempt"]
