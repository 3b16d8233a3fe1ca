"""Texts that are read and not continued: what is refused, how many items come, and that none is taken for a token."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.messages import pack_tokens
from tests.broker.answers import EOS
from tests.broker.world import World, card, emit, finals, request

SIZE = 48
MASK = 250
# An item that looks like the end of a text, and is not the last.
SEED = next(seed for seed in range(1, 1000) if EOS in [emit(seed, 0, index) for index in range(10, SIZE - 1)])


def encoder(**changes):
    return card(
        **{
            "tasks": ("embed", "fill_mask"),
            "embedding_size": SIZE,
            "mask_token_id": MASK,
            "max_model_len": 20,
            "special_tokens": {"mask_token": "[MASK]"},
            **changes,
        }
    )


def read(number: int, task: str = "embed", **settings):
    return request(number, **{"task": task, "max_tokens": None, "ignore_eos": None, **settings})


@pytest.fixture
def world():
    world = World()
    world.group(model=encoder())
    return world


@pytest.mark.parametrize(
    ("settings", "kind", "param", "says"),
    [
        ({"task": "generate"}, InvalidRequestError, "model", "can embed and fill_mask"),
        ({"task": "classify"}, InvalidRequestError, "model", "'classify'"),
        ({"prompt": (1,) * 21}, ContextLengthError, "prompt", "21 tokens does not fit the 20"),
        ({"prompt": ()}, InvalidRequestError, "prompt", "empty"),
        ({"n": 2}, InvalidRequestError, "n", "one answer"),
        ({"pooling": {"pooling": "max"}}, InvalidRequestError, "pooling", "mean or cls"),
        ({"pooling": {"normalize": 1}}, InvalidRequestError, "normalize", "true or false"),
        ({"pooling": {"dimensions": 0}}, InvalidRequestError, "dimensions", "from 1"),
        ({"pooling": {"dimensions": SIZE + 1}}, InvalidRequestError, "dimensions", f"have {SIZE} numbers"),
        ({"min_tokens": SIZE + 1}, InvalidRequestError, "min_tokens", "max_tokens"),
        ({"output": (pack_tokens([0] * (SIZE + 1)),)}, InvalidRequestError, "output", f"the {SIZE} items"),
        ({"task": "fill_mask"}, InvalidRequestError, "prompt", r"no mask token \(\[MASK\]\)"),
        (
            {"task": "fill_mask", "prompt": (MASK,), "output": (pack_tokens([256]),)},
            InvalidRequestError,
            "output",
            "token id 256",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(world, settings, kind, param, says):
    client = world.client()
    (record,) = client.submit(read(1, **settings))
    world.settle()
    assert type(record.error) is kind
    assert record.error.param == param
    with pytest.raises(kind, match=says):
        raise record.error


def test_a_model_that_generates_is_asked_for_nothing_else():
    world = World()
    world.group()
    (record,) = world.client().submit(read(1))
    world.settle()
    assert isinstance(record.error, InvalidRequestError)
    assert "can generate" in record.error.message


def test_a_vector_comes_whole_and_counts_as_no_tokens(world):
    client = world.client()
    (record,) = world.run(client, read(SEED, pooling={"pooling": "cls", "unknown": 1}, prompt=(1,) * 20))
    record.check()
    assert (len(record.tokens[0]), record.reason) == (SIZE, ["length"])
    assert record.max_tokens == SIZE
    (assignment,) = world.groups[0].assigned
    assert (assignment.task, assignment.pooling) == ("embed", {"pooling": "cls"})
    assert world.broker.counters.tokens == 0
    assert world.broker.counters.prompt_tokens == 20


def test_as_many_numbers_as_were_asked_for(world):
    (record,) = world.run(world.client(), read(1, pooling={"dimensions": 5}))
    assert len(record.tokens[0]) == 5


def test_a_word_for_each_mask(world):
    (record,) = world.run(world.client(), read(1, "fill_mask", prompt=(1, MASK, 2, MASK, MASK), logprobs=3))
    assert (len(record.tokens[0]), record.reason) == (3, ["length"])
    assert [len(likeliest) for _, likeliest in record.logprobs[0]] == [3, 3, 3]


def test_an_item_like_an_end_token_is_no_end_when_the_group_dies_behind_it(world):
    """What a stream shows by its last token ends a text, and would cut a vector short."""
    client, group = world.client(), world.groups[0]
    (record,) = client.submit(read(SEED))
    world.settle()
    while not record.tokens[0] or record.tokens[0][-1] != EOS:
        world.step()
    held = len(record.tokens[0])
    group.die()
    world.finish([record])
    assert (len(record.tokens[0]), record.reason) == (SIZE, ["length"])
    assert len(group.assigned[-1].output) == 4 * held


def test_a_restarted_broker_takes_a_half_sent_vector_back(world):
    client, group = world.client(), world.groups[0]
    (record,) = client.submit(read(SEED))
    world.settle()
    world.step(20)
    world.restart_broker()
    group.hello()
    client.reconnect()
    world.finish([record])
    assert (len(record.tokens[0]), record.reason) == (SIZE, ["length"])
    assert group.assigned[-1].task == "embed"


@pytest.mark.parametrize("change", [{"task": "fill_mask"}, {"pooling": {"normalize": False}}])
def test_the_same_id_is_the_same_question(world, change):
    client = world.client()
    first = read(1, prompt=(1, MASK))
    (record,) = world.run(client, first)
    client.submit(dataclasses.replace(first, **change))
    world.settle()
    assert client.conflicts == 1
    client.submit(first)
    world.settle()
    assert client.conflicts == 1
    assert len(finals(client)) == 2
    assert record.error is None


def test_a_group_with_vectors_says_how_long_they_are(world):
    group = world.group("other", model=encoder(embedding_size=0))
    assert group.welcomes == 0
    assert "how many numbers" in group.errors[0].message
