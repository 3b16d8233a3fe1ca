"""An encoder one batch ahead of the host: the tests of its engine once more, and what is its own.

Nothing may come of it but time: the same items come, of the same batches, whatever is dropped, late or fails meanwhile.
"""

from __future__ import annotations

import random

import pytest
import torch

from headrace.messages import Assign, Done, Drain, StreamId, Tokens
from headrace.workers import encoder_results, engines
from headrace.workers.config import EngineConfig
from headrace.workers.device import Download
from headrace.workers.encoder_engine import EncoderEngine
from headrace.workers.encoder_results import Results
from headrace.workers.encoder_runner import EncoderRunner
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_tokenizer import CLS, MASK, SEP
from tests.workers import test_encoder_engine
from tests.workers.test_encoder_engine import *  # noqa: F403  # the tests, which take their fixtures from here
from tests.workers.test_encoder_engine import TEXTS, ask, first_id
from tests.workers.test_leader_loop import HandBroker, leading

# (device, whether batches are graphs)
PLACES = [
    pytest.param(("cpu", False), id="cpu"),
    pytest.param(("cuda", False), marks=pytest.mark.gpu, id="cuda-eager"),
    pytest.param(("cuda", True), marks=pytest.mark.gpu, id="cuda-graphs"),
]


@pytest.fixture(autouse=True)
def _ahead(monkeypatch):
    monkeypatch.setattr(test_encoder_engine, "load_engine", lambda folder, config: load(folder, config=config))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One family is enough: what differs between them is no matter of when vectors are read."""
    folder = tmp_path_factory.mktemp("bert")
    return save_encoder(folder), load(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_encoder(folder)
    return folder


@pytest.fixture(params=PLACES)
def place(request):
    if request.param[0] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


def load(folder, place=None, *, config=None, ahead: bool = True, **settings):
    """An engine, ready to serve; two texts of one token each fill a batch unless `settings` say else."""
    fields = {name: getattr(config, name) for name in EngineConfig.__slots__} if config is not None else {}
    if place is not None:
        device, graphs = place
        fields = {"device": device, "cuda_graphs": graphs, "dtype": "float32", "max_num_seqs": 2}
    engine = engines.load_engine(folder, EngineConfig(**fields | settings | {"async_scheduling": ahead}))
    if place is not None:
        assert isinstance(engine, EncoderEngine)
        engine.warm_up()
    return engine


@pytest.fixture
def order(monkeypatch):
    """What is launched and read, as it happens."""
    happened = []
    for kind, name in ((EncoderRunner, "launch"), (Results, "read")):
        original = getattr(kind, name)

        def noted(self, *args, _call=original, _name=name):
            happened.append(_name)
            return _call(self, *args)

        monkeypatch.setattr(kind, name, noted)
    return happened


def serve(engine: EncoderEngine, asked, seed: int):
    """Let texts come in over some steps until all are done; what was sent, as it came."""
    chance, coming, left = random.Random(seed), iter(asked), len(asked)
    sent = []
    while left or engine.has_work:
        for _ in range(min(left, chance.choice((0, 1, 1, 4)))):
            engine.add(next(coming), 0.0)
            left -= 1
        engine.validate()
        result = engine.step(0.0)
        assert not result.refusals
        assert [run[:3] for run in result.runs] == [finish[:3] for finish in result.finishes]
        sent += result.runs
    return sent


def numbers(result):
    return [run.request[0] for run in result.runs]


def steps_to_the_end(engine: EncoderEngine):
    """Numbers of the texts that each step ends, until nothing is left."""
    sent = []
    while engine.has_work:
        sent.append(numbers(engine.step(0.0)))
        engine.validate()
    return sent


def add(engine: EncoderEngine, *texts, **fields):
    for number, text in enumerate(texts):
        engine.add(ask(number, text, **fields), 0.0)


def strangers(count: int):
    """Texts of all kinds."""
    chance = random.Random(count)
    asked = []
    for number in range(count):
        text = [CLS, *(chance.randrange(3, 200) for _ in range(chance.choice((1, 5, 12, 37)))), SEP]
        pooling = {"pooling": chance.choice(("mean", "cls")), "dimensions": chance.choice((None, 7))}
        asked.append(ask(number, text, pooling=pooling))
        if number % 3 == 0:
            asked[-1] = ask(number, [CLS, MASK, *text[1:]], "fill_mask", sampling={"logprobs": number % 4 or None})
    return asked


def test_the_same_comes_of_the_same_batches(folder, place):
    found = []
    for ahead in (False, True):
        engine = load(folder, place, ahead=ahead, max_batch_tokens=64, max_num_seqs=5)
        found.append(serve(engine, strangers(40), seed=4))
        assert (engine.load_gauges()["graph_replays"] > 5) is place[1]
    assert found[0] == found[1]
    assert len(found[0]) == 40


@pytest.mark.parametrize("ahead", [True, False])
def test_a_batch_is_on_its_way_while_the_one_before_is_read(folder, place, order, ahead):
    engine = load(folder, place, ahead=ahead)
    order.clear()
    add(engine, *[[CLS, SEP]] * 5)
    if ahead:
        assert steps_to_the_end(engine) == [[], [0, 1], [2, 3], [4]]
        assert order == ["launch", "launch", "read", "launch", "read", "read"]
    else:
        assert steps_to_the_end(engine) == [[0, 1], [2, 3], [4]]
        assert order == ["launch", "read"] * 3
    assert engine.steps == 3
    assert engine.load_gauges()["prompt_tokens"] == 10


def test_unless_told_only_a_gpu_goes_ahead(folder, monkeypatch):
    for on_gpu in (False, True):
        monkeypatch.setattr(EncoderRunner, "on_gpu", on_gpu)
        engine = engines.load_engine(folder, EngineConfig(device="cpu"))
        add(engine, TEXTS[0])
        assert numbers(engine.step(0.0)) == ([] if on_gpu else [0])


def test_only_what_was_launched_is_read_when_nothing_else_comes(folder, place):
    engine = load(folder, place)
    add(engine, TEXTS[0])
    assert numbers(engine.step(0.0)) == []
    assert engine.has_work
    assert engine.running() == (StreamId(*first_id(ask(0, TEXTS[0]))),), "it is on hand until it is sent"
    assert engine.steps == 0
    assert numbers(engine.step(0.0)) == [0]
    assert engine.steps == 1
    assert not engine.has_work


def test_a_text_dropped_in_flight_costs_nobody_else(folder, place):
    engine = load(folder, place)
    add(engine, *TEXTS[:3])
    engine.step(0.0)
    engine.revoke(StreamId(*first_id(ask(0, TEXTS[0]))))
    assert steps_to_the_end(engine) == [[1], [2]]
    add(engine, TEXTS[0])
    engine.step(0.0)
    engine.revoke_all()
    assert engine.has_work, "a batch is on its way"
    assert engine.running() == ()
    assert steps_to_the_end(engine) == [[]]


def test_a_new_attempt_in_flight_is_read_anew(folder, place):
    engine = load(folder, place)
    add(engine, TEXTS[0])
    engine.step(0.0)
    engine.add(ask(0, TEXTS[2], attempt=2), 0.0)
    sent = []
    while engine.has_work:
        sent += engine.step(0.0).runs
    assert [run.attempt for run in sent] == [2]
    add(engine, TEXTS[2])
    assert [run.tokens for run in serve(engine, [], seed=0)] == [sent[0].tokens], "it is the vector of the new text"


def test_a_text_launched_in_time_is_sent(folder, place):
    engine = load(folder, place)
    add(engine, *TEXTS[:3], budget_ms=500)
    assert numbers(engine.step(0.4)) == []
    late = engine.step(0.6)
    assert numbers(late) == [0, 1]
    assert [refusal.request[0] for refusal in late.refusals] == [2], "it was not even launched"
    assert not engine.has_work


def test_a_group_that_drains_sends_what_is_on_its_way(folder, place, run_dir):
    engine = load(folder, place)
    broker = HandBroker(f"ipc://{run_dir}/workers")
    try:
        with leading(broker, engine) as leader:
            broker.say(Assign(assignments=tuple(ask(number, TEXTS[0]) for number in range(7))))
            broker.say(Drain(grace_ms=60_000))
            messages = [broker.take(Tokens, Done) for _ in range(8)]  # of four batches
            broker.part()
            assert leader.join() is None
    finally:
        broker.close()
    finishes = [finish for message in messages if isinstance(message, Done) for finish in message.finishes]
    assert [(finish.request[0], finish.reason) for finish in finishes] == [(n, "length") for n in range(7)]


class Fault:
    """Lets some calls of a method fail."""

    def __init__(self, monkeypatch, kind, name, *fails: int) -> None:
        original = getattr(kind, name)
        self.calls = 0

        def call(this, *args):
            self.calls += 1
            if self.calls in fails:
                raise RuntimeError(f"fault {self.calls}")
            return original(this, *args)

        monkeypatch.setattr(kind, name, call)


def test_an_error_in_the_second_batch_does_not_lose_the_first(folder, place, monkeypatch):
    engine = load(folder, place)
    Fault(monkeypatch, EncoderRunner, "launch", 2, 3)
    add(engine, *[TEXTS[0]] * 4)
    assert [numbers(engine.step(0.0)) for _ in range(2)] == [[], [0, 1]]
    with pytest.raises(RuntimeError, match="fault 3"):
        engine.step(0.0)
    assert [stream.request[0] for stream in engine.running()] == [2, 3]
    assert steps_to_the_end(engine) == [[], [2, 3]], "the engine is as it was"


def test_what_cannot_be_launched_behind_another_batch_is_tried_alone(folder, place, monkeypatch, caplog):
    engine = load(folder, place)
    Fault(monkeypatch, EncoderRunner, "launch", 2)
    add(engine, *[TEXTS[0]] * 4)
    assert steps_to_the_end(engine) == [[], [0, 1], [], [2, 3]]
    assert "could not be launched behind another (RuntimeError('fault 2'))" in caplog.text


def test_an_error_where_a_batch_is_read_does_not_lose_the_next(folder, place, monkeypatch):
    engine = load(folder, place)
    Fault(monkeypatch, Results, "read", 1)
    add(engine, *[TEXTS[0]] * 4)
    engine.step(0.0)
    with pytest.raises(RuntimeError, match="fault 1"):
        engine.step(0.0)
    assert steps_to_the_end(engine) == [[2, 3], [0, 1]], "the second was launched; the first is once more"


def test_words_and_vectors_come_by_one_download_that_nobody_waits_for(folder, monkeypatch):
    """Words for masks came by two copies each of which waited for the device."""
    engine, downloads, waits = load(folder, ("cpu", False), max_num_seqs=3), [], []

    class Noted(Download):
        def __init__(self, *tensors):
            downloads.append([tuple(tensor.shape) for tensor in tensors])
            super().__init__(*tensors)

        def wait(self):
            waits.append(None)
            return super().wait()

    monkeypatch.setattr(encoder_results, "Download", Noted)
    engine.add(ask(0, TEXTS[3], "fill_mask", sampling={"logprobs": 4}), 0.0)
    engine.add(ask(1, TEXTS[0], pooling={"pooling": "cls"}), 0.0)
    engine.add(ask(2, TEXTS[4], "fill_mask"), 0.0)
    engine.step(0.0)
    assert (downloads, waits) == ([[(3, 72), (3, 4), (3, 4)]], [])
    assert numbers(engine.step(0.0)) == [0, 1, 2]
    assert len(waits) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("graphs", [False, True])
def test_nothing_waits_but_the_reading(folder, graphs):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    engine = load(folder, ("cuda", graphs), max_batch_tokens=64, max_num_seqs=5)
    warm = serve(engine, strangers(40), seed=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert serve(engine, strangers(40), seed=4) == warm
    finally:
        torch.cuda.set_sync_debug_mode("default")
