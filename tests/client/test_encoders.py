"""Vectors and words for masks, through a real broker: what is asked, what comes in which order, what is refused."""

from __future__ import annotations

import asyncio
import math
import struct
from array import array

import pytest

from headrace.client import AsyncClient, Client, Embeddings, MaskFill
from headrace.client.encoders import AT_ONCE
from headrace.errors import ContextLengthError, DeadlineExceededError, HeadraceError, InvalidRequestError
from tests.client.pool import speaking, wait_until
from tests.client.tiny import encoder_card, tiny_text
from tests.support.tiny_tokenizer import CLS, ENCODER_VOCAB_SIZE, MASK, SEP, encoder_tokenizer_json


def number(prompt, index: int) -> float:
    """What the group below answers: a number that depends on every token of the text."""
    return sum((place + 1) * token for place, token in enumerate(prompt)) / 7 + index


def answer(assignment, index):
    prompt = memoryview(assignment.prompt).cast("I")
    if assignment.task == "embed":
        return struct.unpack("<I", struct.pack("<f", number(prompt, index)))[0]
    return 97 + index  # the letters a, b, c for masks


def vector(text: str, size: int = 6) -> array:
    ids = [CLS, *text.encode(), SEP]
    return array("f", [number(ids, index) for index in range(size)])


@pytest.fixture
def group(pool):
    return pool.start_group(answer, card=encoder_card())


@pytest.fixture
def client(pool, group):
    with Client(pool.endpoint) as client:
        yield client


@pytest.fixture(params=[Client, AsyncClient])
def call(request, pool, group):
    """Calls a method of either client, and waits for it."""

    def call(method, *arguments, **settings):
        if request.param is Client:
            with Client(pool.endpoint) as client:
                return getattr(client, method)(*arguments, **settings)

        async def run():
            async with AsyncClient(pool.endpoint) as client:
                return await getattr(client, method)(*arguments, **settings)

        return asyncio.run(run())

    return call


def test_the_vector_of_a_text(call, group):
    found = call("embed", "abc")
    assert isinstance(found, Embeddings)
    assert (list(found), found.model, found.prompt_tokens) == ([vector("abc")], "reader", 5)
    assert repr(found) == "<Embeddings of reader: 1 vectors of 6>"
    (assignment,) = group.assigned
    # The model's own way, as its card says.
    assert (assignment.task, assignment.pooling) == ("embed", {"pooling": "cls", "normalize": False})


def test_many_texts_come_back_in_order(call):
    texts = [f"text {index}" for index in range(2 * AT_ONCE + 3)]
    found = call("embed", texts)
    assert len(found) == len(texts)
    assert list(found) == [vector(text) for text in texts]
    assert found.prompt_tokens == sum(len(text) + 2 for text in texts)
    assert found[-1] == vector(texts[-1])
    assert list(found[:2]) == [vector(text) for text in texts[:2]]


def test_no_texts_make_no_vectors(call):
    assert list(call("embed", [])) == []


def test_settings_of_the_caller_go_first(call, group):
    assert len(call("embed", "abc", pooling="mean", normalize=True, dimensions=4)[0]) == 4
    assert group.assigned[-1].pooling == {"dimensions": 4}


def test_texts_may_be_token_ids(call, group):
    found = call("embed", [[1, 2, 3], "abc"])
    assert found[0] == array("f", [number([1, 2, 3], index) for index in range(6)])
    assert found[1] == vector("abc")


def test_words_for_masks(call, group):
    fills = call("fill_mask", "x[MASK]y[MASK]", top_k=3)
    assert [[fill.token_id for fill in likeliest] for likeliest in fills] == [[97] * 3, [98] * 3]
    first = fills[0][0]
    assert isinstance(first, MaskFill)
    assert (first.token, first.text) == ("a", "xay")
    assert fills[1][2].text == "xyb"
    assert [fill.probability for fill in fills[0]] == pytest.approx([math.exp(-0.5 - rank) for rank in range(3)])
    (assignment,) = group.assigned
    assert list(memoryview(assignment.prompt).cast("I")) == [CLS, ord("x"), MASK, ord("y"), MASK, SEP]


def test_long_texts_are_refused_or_cut(call, group):
    with pytest.raises(ContextLengthError, match=r"texts\[1\]: The text has 42 tokens, but reader takes 32"):
        call("embed", ["short", "x" * 40])
    found = call("embed", "x" * 40, truncate=True)
    assert list(found) == [vector("x" * 30)]
    assert found.prompt_tokens == 32
    assert len(call("embed", [[5] * 50], truncate=True)[0]) == 6
    assert len(memoryview(group.assigned[-1].prompt)) == 4 * 32


@pytest.mark.parametrize(
    ("method", "arguments", "settings", "param", "says"),
    [
        ("embed", (5,), {}, "texts", "texts is int"),
        ("embed", (b"abc",), {}, "texts", "texts is bytes"),
        ("embed", ([None],), {}, "texts", "A text is NoneType"),
        ("embed", ([b"a"],), {}, "texts", "A text is bytes"),
        ("embed", ("",), {"pooling": "max"}, "pooling", "mean or cls"),
        ("embed", ("a",), {"normalize": "yes"}, "normalize", "true or false"),
        ("embed", ("a",), {"dimensions": 7}, "dimensions", "have 6 numbers"),
        ("embed", ("a",), {"dimensions": 0}, "dimensions", "whole number from 1"),
        ("embed", ("a",), {"timeout": 0}, "timeout", "seconds above 0"),
        ("embed", ([[]],), {}, "texts", "The text is empty"),
        ("embed", ([[ENCODER_VOCAB_SIZE]],), {}, "token_ids", "ids go from 0"),
        ("fill_mask", ("no mask",), {}, "text", r"no \[MASK\]"),
        ("fill_mask", (["[MASK]"],), {}, "text", "text is list"),
        ("fill_mask", ("[MASK]",), {"top_k": 0}, "top_k", "from 1 to 20"),
        ("fill_mask", ("[MASK]",), {"top_k": True}, "top_k", "from 1 to 20"),
        ("generate", ("abc",), {}, "model", "is an encoder and generates no text"),
    ],
)
def test_what_cannot_be_asked_is_said(call, method, arguments, settings, param, says):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        call(method, *arguments, **settings)
    assert caught.value.param == param


def test_a_model_that_generates_makes_no_vectors(pool):
    pool.start_group(speaking("x"))
    with Client(pool.endpoint) as client:
        for method in (client.embed, client.fill_mask):
            with pytest.raises(InvalidRequestError, match="tiny cannot") as caught:
                method("abc")
            assert caught.value.param == "model"


def test_one_text_that_fails_ends_the_call_and_the_others(client, group, pool):
    group.step_delay = 0.05
    with pytest.raises(HeadraceError, match=r"texts\[2\]"):
        client.embed(["a", "b", "x" * 99, "c"])
    wait_until(lambda: pool.running == 0)


def test_the_time_is_for_all_texts_together(client, group):
    group.hang()
    with pytest.raises(DeadlineExceededError):
        client.embed(["a", "b"], timeout=0.2)


def test_a_group_that_dies_costs_no_vector(pool):
    slow = pool.start_group(answer, card=encoder_card(), step_delay=0.05, name="slow")
    with Client(pool.endpoint) as client:
        import threading

        found: list[Embeddings] = []
        reader = threading.Thread(target=lambda: found.append(client.embed(["abc", "def"])))
        reader.start()
        wait_until(lambda: slow.steps >= 3)
        pool.kill(slow)
        pool.start_group(answer, card=encoder_card(), name="other")
        reader.join(60)
    assert list(found[0]) == [vector("abc"), vector("def")]


def test_cutting_keeps_the_tokens_around_a_text():
    text = tiny_text(tokenizer=encoder_tokenizer_json(), template=None)
    assert text.encode("abcdef", limit=5) == [CLS, *b"abc", SEP]
    assert text.encode("abc", limit=5) == [CLS, *b"abc", SEP]
    assert text.encode("abcdef", add_special_tokens=False, limit=4) == [*b"abcd"]
    assert text.encode("abc", limit=1) == [CLS, SEP]  # fewer than the tokens around it there cannot be
