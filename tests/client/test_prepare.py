"""A caller's arguments become a request, or an error that names what is wrong, before anything is sent."""

import dataclasses
import enum

import pytest

from headrace.client.prepare import Wish, prepare
from headrace.client.types import Timeouts
from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.messages import unpack_tokens
from headrace.sampling import SamplingParams
from tests.client.tiny import tiny_text
from tests.support.tiny_tokenizer import VOCAB_SIZE

CHAT = [{"role": "user", "content": "x"}]


def prepared(total=None, card=None, **wish):
    return prepare(Wish(**wish), tiny_text(**(card or {})), total)


def test_a_prompt_becomes_a_request():
    request = prepared(prompt="abc", settings={"max_tokens": 5, "stop": "x", "n": 2}, timeout=2.5)
    assert list(unpack_tokens(request.spec.prompt)) == list(request.prompt) == list(b"abc")
    assert request.spec.model == "tiny"
    assert request.spec.fingerprint == "f0"
    assert request.spec.choices == 2
    assert request.spec.timeout == 2.5
    assert request.spec.sampling == {"max_tokens": 5, "n": 2}  # stop strings need text: they stay here
    assert request.sampling.stop == ("x",)


def test_messages_become_a_request():
    assert list(prepared(messages=CHAT).prompt) == tiny_text().encode_chat(CHAT)


class Id(enum.IntEnum):
    A = 65


class Whole:
    """As whole numbers of numpy and torch are."""

    def __index__(self):
        return 66


def test_token_ids_may_be_anything_whole():
    assert list(prepared(token_ids=(Id.A, Whole(), VOCAB_SIZE - 1)).prompt) == [65, 66, VOCAB_SIZE - 1]


def test_the_clients_time_limit_holds_unless_the_call_has_its_own():
    assert prepared(prompt="x").spec.timeout is None
    assert prepared(prompt="x", total=9.0).spec.timeout == 9.0
    assert prepared(prompt="x", total=9.0, timeout=3).spec.timeout == 3


DEFAULTS = {"sampling_defaults": {"temperature": 0.6, "top_k": 20, "unheard_of": 1}}


def test_what_the_caller_says_goes_before_what_the_model_prefers():
    assert prepared(prompt="x", card=DEFAULTS).sampling == SamplingParams(temperature=0.6, top_k=20)
    settings = {"temperature": 0.0}
    assert prepared(prompt="x", card=DEFAULTS, settings=settings).sampling == SamplingParams(temperature=0.0, top_k=20)


def test_whole_sampling_params_leave_the_models_preferences_out():
    given = SamplingParams(top_p=0.5)
    assert prepared(prompt="x", card=DEFAULTS, sampling=given).sampling == given
    settings = {"seed": 3}
    assert prepared(prompt="x", card=DEFAULTS, sampling=given, settings=settings).sampling == given.replace(seed=3)


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ({}, "exactly one of prompt, messages and token_ids, not none"),
        ({"prompt": "x", "token_ids": [1]}, "not prompt and token_ids"),
        ({"prompt": "x", "messages": CHAT, "token_ids": [1]}, "not prompt and messages and token_ids"),
        ({"prompt": 5}, "prompt must be a string, not int"),
        ({"prompt": [1, 2]}, "token ids go into token_ids"),
        ({"prompt": "x", "sampling": {"n": 1}}, "sampling must be SamplingParams, not dict"),
    ],
)
def test_calls_that_make_no_sense_are_type_errors(wish, complaint):
    with pytest.raises(TypeError, match=complaint):
        Wish(**wish)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("topp", "top_p"),
        ("stop_ids", "stop_token_ids"),
        ("message", "messages"),
        ("timeout_s", "timeout"),
    ],
)
def test_an_unknown_setting_names_the_nearest(name, nearest):
    with pytest.raises(TypeError, match=f"unknown setting '{name}'; did you mean '{nearest}'"):
        Wish(prompt="x", settings={name: 1})


NUMBERS = ["1", None, float("nan"), float("inf"), True, -3, 1e9]
BAD = {
    "max_tokens": ["1", 0, -1, 1.5, True],
    "min_tokens": [-1, 1.5, None],
    "temperature": NUMBERS,
    "top_k": [-1, 0.5, None],
    "top_p": [*NUMBERS, 0],
    "min_p": NUMBERS,
    "repetition_penalty": [*NUMBERS, 0],
    "presence_penalty": NUMBERS,
    "frequency_penalty": NUMBERS,
    "seed": [-1, 2**64, 0.5],
    "n": [0, 17, None, 1.0],
    "stop": [[""], ["x"] * 17, [5], ["x" * 1025], 5, None],
    "stop_token_ids": [[-1], ["x"], list(range(65)), 5, None],
    "logprobs": [-1, 21, True],
    "logit_bias": [[1], {-1: 0}, {1: 101}, {"x": 1}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_every_bad_value_names_its_field(name, value):
    with pytest.raises(InvalidRequestError, match=name) as caught:
        prepared(prompt="x", settings={name: value})
    assert caught.value.param == name


def test_every_setting_is_tried_above():
    assert set(BAD) == {field.name for field in dataclasses.fields(SamplingParams)} - {"ignore_eos"}


@pytest.mark.parametrize("timeout", [0, -1, "5", True, float("nan"), float("inf")])
def test_a_timeout_is_a_span_of_time(timeout):
    with pytest.raises(InvalidRequestError, match="timeout is") as caught:
        Wish(prompt="x", timeout=timeout)
    assert caught.value.param == "timeout"


@pytest.mark.parametrize("name", ["connect", "first_token", "between_tokens", "total"])
@pytest.mark.parametrize("value", [0, -1, "5", True, float("nan")])
def test_timeouts_are_spans_of_time(name, value):
    with pytest.raises(InvalidRequestError, match=name) as caught:
        Timeouts(**{name: value})
    assert caught.value.param == name


def test_only_the_connection_must_come_in_time():
    assert Timeouts(first_token=None, between_tokens=None, total=None).first_token is None
    with pytest.raises(InvalidRequestError, match="connect"):
        Timeouts(connect=None)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 1.0, "1", None, True])
def test_a_token_id_is_one_of_the_models(token):
    with pytest.raises(InvalidRequestError, match=r"token_ids\[2\] is") as caught:
        prepared(token_ids=[1, 2, token])
    assert caught.value.param == "token_ids"


def test_token_ids_are_many():
    with pytest.raises(InvalidRequestError, match="token_ids is int; give a list") as caught:
        prepared(token_ids=5)
    assert caught.value.param == "token_ids"


@pytest.mark.parametrize("wish", [{"prompt": ""}, {"token_ids": []}])
def test_an_empty_prompt(wish):
    with pytest.raises(InvalidRequestError, match="empty") as caught:
        prepared(**wish)
    assert caught.value.param == next(iter(wish))


@pytest.mark.parametrize(
    "wish", [{"prompt": "zyx" * 10}, {"token_ids": [7] * 30}, {"messages": [{"role": "user", "content": "zyx" * 10}]}]
)
def test_a_prompt_that_does_not_fit(wish):
    with pytest.raises(ContextLengthError, match="tiny takes 30, the answer included") as caught:
        prepared(**wish, card={"max_model_len": 30})
    assert caught.value.param == next(iter(wish))


def test_the_size_of_a_wish_tells_long_ones():
    assert Wish(prompt="x" * 1000).size == 1000
    assert Wish(token_ids=[1] * 1000).size == 1000
    assert Wish(messages=[{"role": "user", "content": "x" * 1000}]).size > 1000
    assert Wish(messages=5).size == Wish(token_ids=5).size + 1  # nonsense is found out when it is prepared


def test_a_prompt_is_the_callers_no_more_once_it_was_given():
    ids = [65, 66]
    request = prepared(token_ids=ids)
    ids.append(67)
    assert list(request.prompt) == [65, 66]


@pytest.mark.parametrize("wrong", [True, 1.0, "1", None, -1, VOCAB_SIZE])
@pytest.mark.parametrize("place", [0, 300])
def test_one_wrong_id_among_many_is_found_and_named(wrong, place):
    ids = [65] * 400
    ids[place] = wrong
    with pytest.raises(InvalidRequestError, match=rf"token_ids\[{place}\] is {wrong!r}"):
        prepared(token_ids=ids)
