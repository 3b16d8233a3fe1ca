"""The tests of the engine once more, one step ahead of the tokens that it reads: the same tokens come."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.messages import StreamId
from headrace.workers import engines
from headrace.workers.sampler import Choices
from headrace.workers.scheduler import Scheduler
from tests.support.engines import assign, run
from tests.support.tiny_models import save_model
from tests.workers import test_engine
from tests.workers.test_engine import *  # noqa: F403  # the tests and their fixtures
from tests.workers.test_engine import PROMPTS, STEPS, generate, greedy, load, save_t5


@pytest.fixture(autouse=True)
def _ahead(monkeypatch):
    def load_ahead(folder, config):
        return engines.load_engine(folder, dataclasses.replace(config, async_scheduling=True))

    monkeypatch.setattr(test_engine, "load_engine", load_ahead)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def family(request, tmp_path_factory):
    """Two are enough: what differs between families is no matter of when tokens are read."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_model(folder, request.param)
    return folder, [greedy(reference, text) for text in PROMPTS]


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory):
    """One of them, likewise."""
    folder = tmp_path_factory.mktemp("t5")
    reference = save_t5(folder, "t5")
    return folder, [test_engine.answer(reference, text) for text in PROMPTS]


def test_a_step_is_on_its_way_while_the_one_before_is_read(one):
    engine = load(one[1])
    engine.add(assign(PROMPTS[1], max_tokens=3), 0.0)
    assert engine.step(0.0).runs == [], "launched, not read"
    assert [run_.first for run_ in engine.step(0.0).runs] == [0]
    assert engine.steps == 1
    assert [run_.first for run_ in engine.step(0.0).runs] == [1]
    # All its tokens are chosen, so nothing more is launched.
    assert engine.load_gauges()["generated_tokens"] == 2
    last = engine.step(0.0)
    assert [run_.first for run_ in last.runs] == [2]
    assert [finish.reason for finish in last.finishes] == ["length"]
    assert engine.steps == 3
    assert not engine.has_work


def test_blocks_are_published_while_a_step_computes(one, monkeypatch):
    engine, order = load(one[1]), []
    for kind, name in ((Scheduler, "publish"), (Choices, "read")):
        original = getattr(kind, name)

        def noted(self, *args, _call=original, _name=name):
            order.append(_name)
            return _call(self, *args)

        monkeypatch.setattr(kind, name, noted)
    generate(engine, PROMPTS, max_tokens=STEPS)
    assert order == ["publish", "read"] * engine.steps


def test_what_was_launched_after_an_end_is_dropped_and_its_memory_serves_others(one):
    """A stop token is seen one step late. Meanwhile its stream wrote to its blocks once more; they are free now."""
    reference, folder = one
    expected = [greedy(reference, text) for text in PROMPTS]
    limits = {"kv_tokens": 176, "max_num_seqs": 2}
    engine = load(folder, **limits)
    streams = [
        assign(text, request=index, max_tokens=STEPS, stop_token_ids=[tokens[3 + index]])
        for index, (text, tokens) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    for outcome, tokens, index in zip(run(engine, streams), expected, range(len(PROMPTS)), strict=True):
        assert outcome.tokens == tokens[: tokens.index(tokens[3 + index])]
        assert outcome.reason == "stop"
    assert engine.load_gauges()["kv_blocks_free"] == engine.load_gauges()["kv_blocks_total"]
    assert generate(engine, PROMPTS, max_tokens=STEPS) == expected, "the prefix cache holds what it says"


def test_a_row_and_blocks_taken_over_in_flight_are_the_new_streams_own(one):
    reference, folder = one
    engine = load(folder, max_num_seqs=1, kv_tokens=64)
    first, second = PROMPTS[1], PROMPTS[2]
    engine.add(assign(first, request=1, max_tokens=STEPS), 0.0)
    for _ in range(4):
        engine.step(0.0)
    engine.revoke(StreamId((1).to_bytes(16, "big"), 0, 1))
    assert engine.has_work, "a step is on its way"
    assert generate(engine, [second], max_tokens=STEPS) == [greedy(reference, second)]


def test_penalties_see_the_tokens_before(one):
    """They are counted before anybody reads them."""
    _, folder = one
    settings = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "max_tokens": 12}
    streams = [assign(text, request=index, **settings) for index, text in enumerate(PROMPTS)]
    streams.append(assign(PROMPTS[3], request=9, max_tokens=12))
    ahead = run(load(folder), streams)
    plain = run(engines.load_engine(folder, dataclasses.replace(load(folder).config, async_scheduling=False)), streams)
    assert [outcome.tokens for outcome in ahead] == [outcome.tokens for outcome in plain]
