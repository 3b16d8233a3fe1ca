"""What is computed before READY: every option, lengths on both sides of every power of two, and all of it can run."""

from __future__ import annotations

import os

import pytest

from headrace.kernels.model import Model
from headrace.messages import unpack_tokens
from headrace.sampling import SamplingParams
from headrace.workers.config import EngineConfig
from headrace.workers.engines import load_engine
from headrace.workers.warmup import all_options, examples, lengths_up_to
from tests.support.engines import assign, run
from tests.support.fake_group import fake_card
from tests.support.launches import noted_launches
from tests.support.mixed_load import MIXED_LOAD_CONFIG, MIXED_LOAD_FAMILIES, run_mixed_load
from tests.support.tiny_models import save_model, save_t5


def test_lengths_lie_on_both_sides_of_powers_of_two():
    assert lengths_up_to(1) == [1]
    assert lengths_up_to(8) == [1, 2, 3, 4, 5, 8]
    assert lengths_up_to(100) == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 100]


def test_every_setting_of_a_sampler_is_used_alone_and_together():
    changed = {
        name
        for batch in examples(fake_card("m"), EngineConfig(), sources=False, everything=True)
        for stream in batch
        for name in SamplingParams.from_wire(stream.sampling).to_wire()
    }
    asked_elsewhere = {"n"}  # by the broker
    known = set(SamplingParams.__dataclass_fields__) - {"stop"} - asked_elsewhere
    assert changed == known
    together = SamplingParams.from_wire(all_options() | {"max_tokens": 3, "seed": 1, "ignore_eos": True})
    assert set(together.to_wire()) == known


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_seqs": 1}, {"max_num_seqs": 2, "max_batch_tokens": 7}, {"max_batch_tokens": 1}, {"kv_tokens": 64}]
    + [{"max_model_len": length} for length in (1, 2, 4, 20, 37)],
)
def test_all_of_it_can_be_computed_whatever_the_limits(folders, settings, everything):
    for folder in folders:
        engine = load_engine(folder, EngineConfig(**{"kv_tokens": 1024, "max_batch_tokens": 96} | settings))
        refused = []
        for streams in examples(engine.card, engine.config, sources=folder is folders[1], everything=everything):
            for stream in streams:
                engine.add(stream, 0.0)
            while engine.has_work:
                refused += engine.step(0.0).refusals
                engine.validate()
        assert not refused


def test_steps_are_of_all_kinds(folders):
    """Only prompts, decodes beside a part of a prompt, many rows, and the whole budget."""
    engine = load_engine(folders[0], EngineConfig(kv_tokens=4096, max_batch_tokens=96, max_num_seqs=20))
    kinds = set()
    schedule = engine._scheduler.schedule

    def noted():
        plan = schedule()
        decodes = sum(chunk.num_tokens == 1 for chunk in plan.chunks)
        kinds.add((decodes > 1, len(plan.chunks) > decodes, plan.num_tokens >= 96, len(plan.chunks) == 20))
        return plan

    engine._scheduler.schedule = noted
    for streams in examples(engine.card, engine.config, sources=False, everything=True):
        for stream in streams:
            engine.add(stream, 0.0)
        while engine.has_work:
            engine.step(0.0)
    assert {(False, True, True, False), (True, True, True, False), (True, False, False, True)} <= kinds
    assert any(mixed and prompt and rows for mixed, prompt, _, rows in kinds)


def test_no_two_texts_begin_alike():
    """Or the prefix cache would answer, and less would be computed than is meant."""
    firsts = [
        unpack_tokens(stream.prompt)[0]
        for batch in examples(fake_card("m"), EngineConfig(), sources=False, everything=True)
        for stream in batch
    ]
    assert len(set(firsts)) == min(len(firsts), fake_card("m").vocab_size)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    decoder, both = (tmp_path_factory.mktemp(name) for name in ("decoder", "both"))
    save_model(decoder)
    save_t5(both)
    return decoder, both


def missing(compiled, ready):
    """What was compiled late, each with what sets it apart from the nearest that was there."""
    late = []
    for key in compiled - ready:
        same = [other for other in ready if other[:2] == key[:2]]
        nearest = min(same, key=lambda other: len(set(key) ^ set(other)), default=())
        late.append((key[1], sorted(map(str, set(key) - set(nearest)))))
    return late


noting = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="notes what the interpreter would launch")


@noting
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {"dtype": "bfloat16"}) for family in MIXED_LOAD_FAMILIES if family != "t5"),
        ("t5", {}),
        ("t5", {"max_batch_tokens": 40, "dtype": "bfloat16"}),
    ],
)
def test_nothing_is_left_to_compile(tmp_path, monkeypatch, family, settings):
    """Every kernel that a mixed load launches was launched before, for the same constants and kinds of numbers.

    That of T5's decodes beside the answer of a stream that gave way was not, nor were those that draw for an even
    number of sequences from logits of 16 bits, nor those of sources that are longer than a step may be.
    """
    # Matrices as a GPU has them.
    monkeypatch.setattr("headrace.kernels.weight.pack_weight", lambda weight: weight)
    (save_t5 if family == "t5" else save_model)(tmp_path, family)
    engine = load_engine(tmp_path, EngineConfig(**MIXED_LOAD_CONFIG | settings, async_scheduling=True))
    with noted_launches() as compiled:
        for streams in examples(engine.card, engine.config, sources=family == "t5", everything=True):
            for stream in streams:
                engine.add(stream, 0.0)
            while engine.has_work:
                engine.step(0.0)
        ready = set(compiled)
        run_mixed_load(engine, requests=30)
        run_mixed_load(engine, requests=15, longest=16)  # no context is so long that several programs share it
    assert len(ready) > 5
    assert not missing(compiled, ready)


@noting
def test_what_a_reference_does_is_no_launch(tmp_path, monkeypatch):
    """Noted was what no GPU launches: attention to a cache that the step's keys were written to before."""
    monkeypatch.setattr(Model, "pack", lambda model: None)
    save_model(tmp_path)
    engine = load_engine(tmp_path, EngineConfig(kv_tokens=256))
    with noted_launches() as compiled:
        run(engine, [assign([5], max_tokens=3)])  # decodes alone
    names = {key[1] for key in compiled}
    assert "_decode" in names
    assert not names & {"_rotate_and_cache", "_attend"}
    assert all(dict(key[2:])["NEWEST"] for key in compiled if key[1] == "_decode")


@noting
def test_a_norm_that_is_left_to_products_is_launched_with_them(tmp_path, monkeypatch):
    """The reference of `share_norm` leaves none, so noted were products that no GPU launches for one row."""
    monkeypatch.setattr(Model, "pack", Model.fold)
    save_model(tmp_path, "gptj")
    engine = load_engine(tmp_path, EngineConfig(kv_tokens=256))
    with noted_launches() as compiled:
        run(engine, [assign([5], max_tokens=3)])
    products = [dict(key[2:]) for key in compiled if key[1] == "gemv_both"]
    assert [(product["ROWS"], product["NORM"]) for product in products] == [(1, "layer")]
