"""What READY promises, by loads as large as real ones: nothing is compiled or captured afterwards.

Only a GPU compiles and captures, see test_ready_gpu.py. Here the same loads run on a CPU, smaller, so that a mistake of
theirs is found where there is no GPU.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.workers.config import EngineConfig
from headrace.workers.encoder_engine import EncoderEngine
from headrace.workers.engine import Engine
from headrace.workers.engines import load_engine
from tests.support.engines import assign, run
from tests.support.mixed_load import run_mixed_load
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import save_model
from tests.support.tiny_tokenizer import CLS, MASK, SEP
from tests.workers.test_encoder_engine import ask


@contextmanager
def all_in_place(engine: Engine | EncoderEngine, caplog) -> Iterator[None]:
    """Within, an engine that is ready compiles and captures nothing."""
    ready = engine.load_gauges()
    caplog.set_level(logging.DEBUG, "headrace.workers.compilations")
    caplog.clear()
    yield
    after = engine.load_gauges()
    assert after["compilations"] == ready["compilations"] == 0, caplog.messages
    assert after["graphs"] == ready["graphs"]


def serve_long_texts(engine: Engine, unit: int) -> int:
    """Prompts of up to six units, of which two are chunks of several steps, while others decode; how many steps no
    graph computed."""
    asked = [
        assign([(7 * number + place) % 250 for place in range(length)], request=number, max_tokens=20)
        for number, length in enumerate((3, unit, 6 * unit, 3 * unit + 1, 17, 5 * unit - 3))
    ]
    before = engine.steps - engine.load_gauges()["graph_replays"]
    assert [outcome.reason for outcome in run(engine, asked)] == ["length"] * len(asked)
    return int(engine.steps - engine.load_gauges()["graph_replays"] - before)


def read_texts(engine: EncoderEngine) -> list[int]:
    """Texts of all lengths up to the longest, alone and together, in all ways that vectors are made, and masks; the
    tokens of each text that came back."""
    chance, longest = random.Random(5), engine.card.max_model_len
    tasks = [("embed", {}), ("embed", {"pooling": {"pooling": "cls"}}), ("fill_mask", {"sampling": {"logprobs": 2}})]
    lens: dict[int, int] = {}
    read: list[int] = []

    def step() -> None:
        result = engine.step(0.0)
        assert not result.refusals
        read.extend(lens[finish.request[0]] for finish in result.finishes)

    for number in range(150):
        lens[number] = longest if number == 7 else chance.randint(3, longest)
        task, settings = chance.choice(tasks)
        text = [CLS, MASK, *(chance.randrange(3, 40) for _ in range(lens[number] - 3)), SEP]
        engine.add(ask(number, text, task, **settings), 0.0)
        # A few come at once now and then: more than one step holds, or than any graph.
        if number % 50 < 30 and chance.random() < 0.5:
            step()
    while engine.has_work:
        step()
    return read


def test_long_texts_are_served_and_leave_nothing_behind(tmp_path, caplog):
    save_model(tmp_path, "llama", num_hidden_layers=2)
    engine = load_engine(tmp_path, EngineConfig(kv_tokens=1536, max_num_seqs=20, max_batch_tokens=256, device="cpu"))
    assert isinstance(engine, Engine)
    engine.warm_up()
    with all_in_place(engine, caplog):
        # 15 units and a few tokens, 256 of which are a step, and then decodes.
        assert serve_long_texts(engine, unit=60) >= 900 // 256 + 19
        run_mixed_load(engine, requests=10)
    gauges = engine.load_gauges()
    assert gauges["kv_blocks_free"] == gauges["kv_blocks_total"]


def test_an_encoder_reads_all_texts_that_it_is_sent(tmp_path, caplog):
    save_encoder(tmp_path, max_position_embeddings=100)
    engine = load_engine(tmp_path, EngineConfig(max_num_seqs=20, max_batch_tokens=700, device="cpu"))
    assert isinstance(engine, EncoderEngine)
    engine.warm_up()
    steps = engine.steps
    with all_in_place(engine, caplog):
        read = read_texts(engine)
    assert len(read) == 150
    assert max(read) == engine.card.max_model_len == 100
    assert sum(read) / (engine.steps - steps) > 100, "texts are hardly ever read together"
