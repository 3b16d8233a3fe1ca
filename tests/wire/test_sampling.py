"""Sampling settings: every bad value is refused by name, good ones cross the wire unchanged."""

from __future__ import annotations

import dataclasses
import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import sampling
from headrace.errors import InvalidRequestError
from headrace.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP, MAX_STOP_LENGTH, SamplingParams

WHOLE = [-1, 1.5, "1", None, True, [1]]
REAL = [10**400, math.nan, math.inf, -math.inf, "1", None, True, [0.5]]

BAD = {
    "max_tokens": [0, -1, 1.5, "8", True, 2**31],
    "min_tokens": [*WHOLE, 2**31],
    "temperature": [*REAL, -0.1, 100.1],
    "top_k": [*WHOLE, 2**31],
    "top_p": [*REAL, 0, 0.0, -0.1, 1.01],
    "min_p": [*REAL, -0.1, 1.01],
    "repetition_penalty": [*REAL, 0, -1, 100.1],
    "presence_penalty": [*REAL, -2.1, 2.1],
    "frequency_penalty": [*REAL, -2.1, 2.1],
    "seed": [-1, 2**64, 1.5, "1", True],
    "n": [*WHOLE, 0, MAX_N + 1],
    "stop": [("",), ("x" * (MAX_STOP_LENGTH + 1),), ("a",) * (MAX_STOP + 1), (1,), ("a", None), "", 5, None],
    "stop_token_ids": [(-1,), (1.5,), ("1",), (True,), tuple(range(65)), 5, None, "12"],
    "ignore_eos": [1, 0, "yes", None],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.5, True, "3"],
    "logit_bias": [
        {-1: 1.0},
        {1.5: 1.0},
        {"1": 1.0},
        {1: 101.0},
        {1: math.nan},
        {1: "x"},
        {1: None},
        dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0),
        [(1, 1.0)],
        None,
        5,
    ],
}

GOOD = {
    "max_tokens": [None, 1, 2**31 - 1],
    "min_tokens": [0, 5],
    "temperature": [0, 0.0, 1, 0.7, 100.0],
    "top_k": [0, 1, 2**31 - 1],
    "top_p": [1, 1.0, 1e-9],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [1e-9, 1, 100],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2, 0, 2.0],
    "seed": [None, 0, 2**64 - 1],
    "n": [1, MAX_N],
    "stop": [(), ("x",), ("x" * MAX_STOP_LENGTH,) * MAX_STOP, ["a", "b"], "one"],
    "stop_token_ids": [(), (0, 2**31 - 1), [1, 2]],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "logit_bias": [{}, {0: -100, 5: 100.0}],
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_every_field_is_covered_here():
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(BAD) == set(GOOD) == names


@pytest.mark.parametrize(("name", "value"), cases(BAD), ids=str)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(("name", "value"), cases(GOOD), ids=str)
def test_a_good_value_is_kept(name, value):
    kept = getattr(SamplingParams(**{name: value}), name)
    if name == "stop" and isinstance(value, str):
        assert kept == (value,)
    else:
        assert kept == (tuple(value) if isinstance(value, list) else value)


def test_min_tokens_must_not_exceed_max_tokens():
    with pytest.raises(InvalidRequestError, match="at most max_tokens") as caught:
        SamplingParams(max_tokens=4, min_tokens=5)
    assert caught.value.param == "min_tokens"
    SamplingParams(max_tokens=4, min_tokens=4)


@pytest.mark.parametrize(
    ("wire", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"n": 99}, "n"),
        ({"logit_bias": [[1]]}, None),
        ({"logit_bias": [1]}, None),
        ({"logit_bias": 5}, None),
        ({"logit_bias": [[[], 1.0]]}, None),
        ({"stop_token_ids": 5}, None),
        ({"stop_token_ids": [[1]]}, "stop_token_ids"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"max_tokens": [1]}, "max_tokens"),
    ],
    ids=str,
)
def test_bad_wire_settings_are_refused(wire, param):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams.from_wire(wire)
    assert caught.value.param == (param or "sampling") or (param is None and caught.value.param in wire)


params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(20, 100),
    min_tokens=st.integers(0, 20),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    seed=st.none() | st.integers(0, 2**64 - 1),
    n=st.integers(1, MAX_N),
    stop_token_ids=st.lists(st.integers(0, 1000), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
    logit_bias=st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=4),
)


@given(params)
def test_settings_cross_the_wire_unchanged(given_params):
    wire = msgpack.unpackb(msgpack.packb(given_params.to_wire()), strict_map_key=True)
    assert SamplingParams.from_wire(wire) == given_params


def test_the_wire_carries_what_differs_and_never_the_stop_strings():
    assert SamplingParams(stop=("a", "b")).to_wire() == {}
    assert SamplingParams(temperature=0.5, stop="x").to_wire() == {"temperature": 0.5}
    assert SamplingParams.from_wire({"stop": ["x"]}).stop == ()


def test_settings_of_a_newer_version_are_ignored():
    assert SamplingParams.from_wire({"temperature": 0.5, "brand_new": [1, 2]}) == SamplingParams(temperature=0.5)


def test_settings_are_frozen_values():
    first, same = SamplingParams(logit_bias={1: 2.0}), SamplingParams(logit_bias={1: 2.0})
    assert first == same
    assert first.replace(n=2) != first
    assert first.replace(n=2).logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.n = 2
    with pytest.raises(TypeError):
        first.logit_bias[1] = 3.0
    with pytest.raises(InvalidRequestError):
        first.replace(n=0)


def test_greedy_is_temperature_zero():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().greedy


def test_exports_are_pinned():
    assert sampling.__all__ == [
        "MAX_LOGIT_BIAS",
        "MAX_LOGPROBS",
        "MAX_N",
        "MAX_STOP",
        "MAX_STOP_LENGTH",
        "SamplingParams",
    ]
