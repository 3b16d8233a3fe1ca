"""Steps at fixed addresses: the tokens of the engine as it is, whatever comes, goes and fills a batch up.

Here the step is computed again and again as a graph computes it, by the kernels, which Triton interprets; that it can
be captured is for a GPU to show.
"""

from __future__ import annotations

from array import array

import pytest
import torch

from headrace.kernels.ops.pair import kernels_on_cpu
from headrace.messages import StreamId
from headrace.sampling import SamplingParams
from headrace.workers import graphs, runner, sampler
from headrace.workers.device import Upload
from headrace.workers.engine import Engine, EngineConfig
from headrace.workers.engines import load_engine
from headrace.workers.graphs import StaticDecodes
from headrace.workers.scheduler import Chunk, Plan
from headrace.workers.sequence import Sequence
from headrace.workers.step_graphs import StepGraphs
from tests.support.engines import assign, generate, run
from tests.support.graphs_on_cpu import Pretended
from tests.support.kernels import Kernels
from tests.support.static_steps import InterpretedSteps
from tests.support.tiny_models import save_model, save_t5

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

PROMPTS = [[5], list(range(60, 73)), [9, 9]]


def load(folder, **config) -> Engine:
    Kernels("interpreted")  # skips where kernels are compiled
    settings = {"kv_tokens": 512, "block_size": 8, "dtype": "float32", "max_num_seqs": 4, "device": "cpu"} | config
    engine = load_engine(folder, EngineConfig(**settings))
    assert isinstance(engine, Engine)
    return engine


def with_static_steps(engine: Engine) -> Engine:
    engine._runner._graphs = InterpretedSteps(engine._runner.static_steps())
    return engine


# All families are compared on a GPU, with real graphs (test_engine_gpu).
@pytest.mark.parametrize("family", ["qwen2-tied", "t5"])
def test_tokens_are_those_of_the_engine_without(tmp_path, family):
    (save_t5 if family == "t5" else save_model)(tmp_path, family)
    expected = generate(load(tmp_path, max_model_len=32), PROMPTS, max_tokens=5)
    engine = with_static_steps(load(tmp_path, max_model_len=32))
    assert generate(engine, PROMPTS, max_tokens=5) == expected
    assert engine.load_gauges()["graph_replays"] >= 3
    # Rows are used again, by sequences with other blocks.
    assert generate(engine, PROMPTS[::-1], max_tokens=5) == expected[::-1]


def test_a_step_of_nobody(tmp_path):
    """So they are captured: all that is computed fills up, and reads no more of its table than there is."""
    save_model(tmp_path)
    for kind in load(tmp_path, max_num_seqs=3, max_model_len=8, kv_tokens=8)._runner.static_steps():
        size = kind.sizes[0]
        kind.fill((), size)
        with kernels_on_cpu():
            computed = kind.compute(size)
        assert computed.logits.isfinite().all()
        contexts = kind._layouts[size].tensors(kind._inputs)[4]
        assert isinstance(kind, StaticDecodes) or contexts.max() <= 8, "a context beyond the table"
        assert (computed.tokens >= 0).all()


def test_as_many_rows_as_tokens_of_a_prompt_step(tmp_path):
    """The logits of a step with prompts are those of its sequences' last tokens, also if it has no more tokens than
    there are rows."""
    save_model(tmp_path)
    limits = {"max_model_len": 32, "max_batch_tokens": 16, "max_num_seqs": 16}
    expected = generate(load(tmp_path, **limits), PROMPTS[:2], max_tokens=3)
    assert generate(with_static_steps(load(tmp_path, **limits)), PROMPTS[:2], max_tokens=3) == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_in_chunks_beside_decodes(tmp_path, ahead):
    """Steps of seven tokens: prompts begin and end anywhere in them, and decodes are among them."""
    save_model(tmp_path)
    limits = {"max_model_len": 32, "max_batch_tokens": 7}
    expected = generate(load(tmp_path, **limits), PROMPTS, max_tokens=5)
    engine = with_static_steps(load(tmp_path, **limits, async_scheduling=ahead))
    assert generate(engine, PROMPTS, max_tokens=5) == expected
    assert engine.load_gauges()["graph_replays"] == engine.steps, "every step is one that could be a graph"


def test_preempted_sequences_show_their_new_blocks(tmp_path):
    save_model(tmp_path)
    limits = {"kv_tokens": 32, "block_size": 4, "max_model_len": 32}
    expected = generate(load(tmp_path, **limits), PROMPTS, max_tokens=9)
    engine = with_static_steps(load(tmp_path, **limits))
    assert generate(engine, PROMPTS, max_tokens=9) == expected
    assert engine.load_gauges()["preemptions"] > 0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_more_news_of_blocks_than_a_step_brings(tmp_path, monkeypatch, family):
    """They come by themselves; the step's room for news tells nothing then, and next to nothing before."""
    (save_t5 if family == "t5" else save_model)(tmp_path, family)
    limits = {"kv_tokens": 96, "block_size": 4, "max_model_len": 48, "async_scheduling": True}
    expected = generate(load(tmp_path, **limits), PROMPTS, max_tokens=9)
    brought = []
    upload_all = graphs.upload_all
    monkeypatch.setattr(graphs, "upload_all", lambda *args: brought.append(1) or upload_all(*args))
    monkeypatch.setattr(graphs, "_NEWS", 2)
    engine = with_static_steps(load(tmp_path, **limits))
    assert generate(engine, PROMPTS, max_tokens=9) == expected
    assert 0 < len(brought) < engine.load_gauges()["graph_replays"]


def test_a_step_is_brought_in_one_copy(tmp_path, monkeypatch):
    save_model(tmp_path)
    engine = with_static_steps(load(tmp_path, max_model_len=32, async_scheduling=True))
    sent = []
    send = Upload.send
    monkeypatch.setattr(Upload, "send", lambda way, count: sent.append(count) or send(way, count))
    for module in (graphs, runner, sampler):
        for name in {"upload", "upload_all"} & vars(module).keys():
            monkeypatch.setattr(module, name, lambda *args: pytest.fail("something else is copied"))
    generate(engine, PROMPTS, max_tokens=5)
    assert len(sent) == engine.steps == engine.load_gauges()["graph_replays"]


def test_what_fills_a_batch_up_touches_nobody(tmp_path):
    """Three sequences take the step of four; the fourth row writes to a block of its own."""
    save_model(tmp_path)
    engine = with_static_steps(load(tmp_path, max_model_len=32))
    kv = engine._runner.kv
    outcomes = run(engine, [assign(prompt, request=n, max_tokens=3) for n, prompt in enumerate(PROMPTS)])
    assert all(len(outcome.tokens) == 3 for outcome in outcomes)
    keys, _ = kv.layer(0)
    scratch = keys[kv.scratch_block * kv.block_size :][: kv.block_size]
    assert scratch[0].abs().sum() > 0
    assert kv.scratch_block == engine.kv_tokens // kv.block_size
    torch.testing.assert_close(keys[-kv.block_size :], torch.zeros_like(keys[-kv.block_size :]))


def test_without_room_for_graphs_steps_are_computed_without(tmp_path, monkeypatch, caplog):
    save_model(tmp_path)
    engine = load(tmp_path, max_model_len=32)
    runner = type(engine._runner)

    def no_room(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(runner, "on_gpu", True)
    monkeypatch.setattr(StepGraphs, "capture", no_room)
    engine.warm_up()
    assert "no memory for CUDA graphs (CUDA out of memory" in caplog.text
    assert len(generate(engine, PROMPTS[:1], max_tokens=3)[0]) == 3
    assert engine.load_gauges()["graph_replays"] == 0


def test_only_what_was_asked_for_is_captured(tmp_path, monkeypatch):
    save_model(tmp_path)
    expected = generate(load(tmp_path, max_model_len=32), PROMPTS, max_tokens=5)
    pretended = Pretended(monkeypatch)
    engine = load(tmp_path, max_model_len=32)
    for count in (3, 1, 4, 99):
        engine.capture_decodes(count)
    assert pretended.sizes == [4, 1]
    assert generate(engine, PROMPTS, max_tokens=5) == expected
    assert generate(engine, PROMPTS[:2], max_tokens=5) == expected[:2]
    gauges = engine.load_gauges()
    assert (gauges["graphs"], gauges["graph_replays"]) == (2, 4), "two decode without a graph of theirs"
    engine.drop_graphs()
    assert generate(engine, PROMPTS, max_tokens=5) == expected
    assert not pretended.alive


def test_decodes_that_somebody_else_decides(tmp_path, monkeypatch):
    """The logits are those of a step of the engine; without a graph there are none."""
    save_model(tmp_path)
    Pretended(monkeypatch)
    runner = load(tmp_path, max_model_len=32)._runner
    sequences = []
    for row, prompt in enumerate(PROMPTS[:2]):
        sequence = Sequence(StreamId(b"", row, 0), array("I", prompt), SamplingParams(temperature=0.0), max_tokens=4)
        sequence.row, sequence.blocks = row, [2 * row, 2 * row + 1]
        sequences.append(sequence)
    first = [one.token for one in runner.launch(Plan(tuple(Chunk(one, len(one.tokens)) for one in sequences))).read()]
    for sequence in sequences:
        sequence.num_computed = len(sequence.tokens)
        sequence.expect()
    assert runner.replay(sequences, torch.tensor(first)) is None
    runner.capture_decodes(2)
    got = runner.replay(sequences, torch.tensor(first)).clone()
    for sequence, token in zip(sequences, first, strict=True):
        sequence.append(token)
    expected = runner.model(runner._builder.build([Chunk(one, 1) for one in sequences]), runner.kv)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (32, [1, 2, 4, 8, 16, 24, 32])],
)
def test_sizes_of_decodes(tmp_path, rows, sizes):
    save_model(tmp_path)
    decodes, _ = load(tmp_path, max_num_seqs=rows)._runner.static_steps()
    assert list(decodes.sizes) == sizes


@pytest.mark.parametrize(
    ("max_tokens", "sizes"),
    [(8, [8]), (64, [16, 64]), (200, [16, 64, 128, 200]), (8192, [16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048])],
)
def test_sizes_of_prompts(tmp_path, max_tokens, sizes):
    save_model(tmp_path)
    _, prompts = load(tmp_path, max_batch_tokens=max_tokens)._runner.static_steps()
    assert list(prompts.sizes) == sizes
