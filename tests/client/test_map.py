"""The window of a map: bounded, each item once, in order if asked for, whatever finishes when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.client.map import Outcome, Window, item_wish
from headrace.client.types import Completion, Usage
from headrace.errors import InvalidRequestError, OverloadedError

DONE = Completion("id", "tiny", 1, (), Usage(1, 1))
FAILED = OverloadedError("full")
AHEAD = 4


@settings(deadline=None, max_examples=300)
@given(
    concurrency=st.integers(1, 5),
    ordered=st.booleans(),
    count=st.integers(0, 40),
    data=st.data(),
)
def test_items_come_out_once_and_the_window_is_bounded(concurrency, ordered, count, data):
    window = Window(concurrency, ordered=ordered)
    prompts = iter(range(100, 100 + count))
    running: list[int] = []
    finished_order: list[int] = []
    out: list[Outcome] = []
    more = True
    while more or running or not window.empty:
        while more and window.room:
            if (prompt := next(prompts, None)) is None:
                more = False
                break
            index = window.start(prompt)
            assert prompt == 100 + index
            running.append(index)
        assert len(running) <= concurrency
        out += window.ready()
        held = len(finished_order) - len(out) + len(running)
        assert held <= AHEAD * concurrency
        if running:
            index = running.pop(data.draw(st.integers(0, len(running) - 1)))
            window.finish(index, FAILED if index % 3 == 0 else DONE)
            finished_order.append(index)
        out += window.ready()
    indexes = [item.index for item in out]
    assert indexes == (list(range(count)) if ordered else finished_order)
    for item in out:
        assert item.prompt == 100 + item.index
        assert (item.result, item.error) == ((None, FAILED) if item.index % 3 == 0 else (DONE, None))


def test_a_slow_first_item_stops_the_reading():
    """An endless source must not fill the memory while one answer takes its time."""
    window = Window(2, ordered=True)
    first = window.start("slow")
    started = 1
    while window.room:
        window.finish(window.start("quick"), DONE)
        started += 1
        assert list(window.ready()) == []
    assert started == 2 * AHEAD
    window.finish(first, DONE)
    assert [item.index for item in window.ready()] == list(range(started))


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "8", None, True])
def test_concurrency_is_a_count(concurrency):
    with pytest.raises(InvalidRequestError, match="concurrency is") as caught:
        Window(concurrency, ordered=True)
    assert caught.value.param == "concurrency"


@pytest.mark.parametrize(
    ("item", "kind"),
    [("text", "prompt"), ("", "prompt"), ([{"role": "user", "content": "x"}], "messages"), ([1, 2], "token_ids")],
)
def test_what_an_item_may_be(item, kind):
    wish = item_wish(item, {"model": "m", "timeout": 3.0, "settings": {"n": 2}})
    assert getattr(wish, kind) == item
    assert (wish.model, wish.timeout, wish.settings) == ("m", 3.0, {"n": 2})


@pytest.mark.parametrize("item", [None, 5, [], b"bytes", {"role": "user"}, (), {1, 2}])
def test_what_an_item_may_not_be(item):
    with pytest.raises(InvalidRequestError, match="an item is") as caught:
        item_wish(item, {})
    assert caught.value.param == "prompts"
