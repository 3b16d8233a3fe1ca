"""The engine of encoders: vectors and words as transformers has them, whole texts by budget, attempts, ends."""

from __future__ import annotations

from array import array
from contextlib import nullcontext

import pytest
import torch

from headrace.errors import InvalidRequestError, UnsupportedModelError, from_wire
from headrace.kernels.ops.pair import kernels_on_cpu
from headrace.messages import Assignment, StreamId, pack_tokens, unpack_tokens
from headrace.workers.encoder_engine import EncoderEngine
from headrace.workers.engine import Engine, EngineConfig
from headrace.workers.engines import load_engine
from tests.support.kernels import Kernels
from tests.support.tiny_encoders import make_encoder, save_encoder
from tests.support.tiny_models import save_model
from tests.support.tiny_tokenizer import CLS, MASK, SEP

TEXTS = ([CLS, 5, 9, SEP], [CLS, SEP], [CLS, *range(3, 33), SEP], [CLS, 40, MASK, 7, MASK, SEP], [CLS, MASK, SEP])


def load(folder, **settings) -> EncoderEngine:
    engine = load_engine(folder, EngineConfig(**{"dtype": "float32", **settings}))
    assert isinstance(engine, EncoderEngine)
    return engine


@pytest.fixture(scope="module", params=["bert", "roberta"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save_encoder(folder, request.param), load(folder)


def ask(number: int, tokens, task: str = "embed", *, attempt: int = 1, **fields) -> Assignment:
    return Assignment(
        request=bytes([number]) * 16, choice=0, attempt=attempt, prompt=pack_tokens(tokens), task=task, **fields
    )


def run(engine: EncoderEngine, *assignments: Assignment):
    """What comes of assignments, by the first byte of the request."""
    runs, finishes, refusals = {}, {}, {}
    for assignment in assignments:
        engine.add(assignment, 0.0)
    while engine.has_work:
        engine.validate()
        result = engine.step(0.0)
        runs |= {r.request[0]: r for r in result.runs}
        finishes |= {f.request[0]: f for f in result.finishes}
        refusals |= {r.request[0]: from_wire(r.error) for r in result.refusals}
    return runs, finishes, refusals


@torch.inference_mode()
def states(model, tokens):
    return model(torch.tensor([tokens]), output_hidden_states=True)


def floats(packed: bytes) -> torch.Tensor:
    return torch.tensor(array("f", packed))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dimensions", [None, 7])
def test_vectors_are_those_of_transformers(pair, pooling, normalize, dimensions):
    model, engine = pair
    params = {"pooling": pooling, "normalize": normalize, "dimensions": dimensions}
    runs, finishes, _ = run(engine, *(ask(n, text, pooling=params) for n, text in enumerate(TEXTS)))
    for number, text in enumerate(TEXTS):
        hidden = states(model, text).hidden_states[-1][0]
        expected = (hidden.mean(0) if pooling == "mean" else hidden[0])[:dimensions]
        if normalize:
            expected = expected / expected.norm()
        found = floats(runs[number].tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (finishes[number].reason, finishes[number].total) == ("length", len(expected))
        assert runs[number].logprobs is None


def test_masks_are_filled_as_transformers_fills_them(pair):
    model, engine = pair
    runs, finishes, _ = run(
        engine,
        ask(3, TEXTS[3], "fill_mask", sampling={"logprobs": 4}),
        ask(0, TEXTS[0]),
        ask(4, TEXTS[4], "fill_mask", sampling={"logprobs": 1}),
        ask(5, TEXTS[3], "fill_mask"),
    )
    for number, text, top in ((3, TEXTS[3], 4), (4, TEXTS[4], 1)):
        places = [place for place, token in enumerate(text) if token == MASK]
        expected = states(model, text).logits[0, places].log_softmax(-1).topk(top)
        found = runs[number].logprobs
        assert list(unpack_tokens(runs[number].tokens)) == expected.indices[:, 0].tolist()
        assert [[token for token, _ in likeliest] for _, likeliest in found] == expected.indices.tolist()
        values = torch.tensor([[value for _, value in likeliest] for _, likeliest in found])
        torch.testing.assert_close(values, expected.values, rtol=1e-4, atol=1e-4)
        assert [first for first, _ in found] == [likeliest[0][1] for _, likeliest in found]
        assert (finishes[number].reason, finishes[number].total) == ("length", len(places))
    assert runs[5].logprobs is None
    assert runs[5].tokens == runs[3].tokens
    assert len(floats(runs[0].tokens)) == engine.card.embedding_size


def test_what_an_earlier_attempt_sent_is_not_sent_again(pair):
    _, engine = pair
    whole, _, _ = run(engine, ask(1, TEXTS[0]), ask(2, TEXTS[3], "fill_mask", sampling={"logprobs": 2}))
    vector, words = whole[1], whole[2]
    runs, finishes, _ = run(
        engine,
        ask(1, TEXTS[0], attempt=2, output=vector.tokens[:40]),
        ask(2, TEXTS[3], "fill_mask", attempt=2, sampling={"logprobs": 2}, output=words.tokens[:4]),
        ask(3, TEXTS[0], attempt=2, output=vector.tokens),
    )
    assert (runs[1].first, runs[1].tokens) == (10, vector.tokens[40:])
    assert (runs[2].first, runs[2].tokens, runs[2].logprobs) == (1, words.tokens[4:], words.logprobs[1:])
    assert 3 not in runs
    assert [finishes[n].total for n in (1, 2, 3)] == [engine.card.embedding_size, 2, engine.card.embedding_size]


def test_attempts_and_revocation(pair):
    _, engine = pair
    first, second = ask(1, TEXTS[0]), ask(1, TEXTS[0], attempt=2)
    engine.add(second, 0.0)
    engine.add(first, 0.0)
    engine.revoke(StreamId(*first_id(first)))
    assert engine.running() == (StreamId(*first_id(second)),)
    engine.revoke(StreamId(*first_id(second)))
    assert not engine.has_work
    engine.add(first, 0.0)
    engine.add(second, 0.0)
    assert engine.running() == (StreamId(*first_id(second)),)
    engine.revoke_all()
    assert not engine.has_work
    assert engine.step(0.0).runs == []


def first_id(assignment: Assignment):
    return assignment.request, assignment.choice, assignment.attempt


def test_a_step_reads_whole_texts_of_its_budget_in_order(pair, tmp_path):
    save_encoder(tmp_path)
    engine = load(tmp_path, max_batch_tokens=40, max_num_seqs=3)
    lens = (30, 11, 2, 2, 2, 2, 40)
    for number, length in enumerate(lens):
        engine.add(ask(number, [7] * length), 0.0)
    steps = []
    while engine.has_work:
        steps.append([run.request[0] for run in engine.step(0.0).runs])
    # One batch ahead of the host, the first step sends nothing.
    assert [sent for sent in steps if sent] == [[0], [1, 2, 3], [4, 5], [6]]
    assert engine.steps == 4
    gauges = {"running": 0, "waiting": 0, "prompt_tokens": sum(lens), "graph_replays": 0, "graphs": 0}
    gauges["compilations"] = 0
    assert engine.load_gauges() == gauges


def test_a_text_is_the_same_alone_and_among_others(pair):
    _, engine = pair
    alone = {n: run(engine, ask(n, text))[0][n].tokens for n, text in enumerate(TEXTS)}
    together, _, _ = run(engine, *(ask(n, text) for n, text in enumerate(TEXTS)))
    for number in alone:
        torch.testing.assert_close(floats(together[number].tokens), floats(alone[number]), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("place", ["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_give_the_same(place, tmp_path):
    save_encoder(tmp_path, "bert")
    asked = [ask(n, text) for n, text in enumerate(TEXTS)] + [ask(9, TEXTS[3], "fill_mask", sampling={"logprobs": 3})]
    expected, _, _ = run(load(tmp_path, device="cpu"), *asked)
    place_of_kernels = Kernels(place)
    by_kernels = load(tmp_path, device=place_of_kernels.device.type)
    with nullcontext() if place == "cuda" else kernels_on_cpu():
        found, _, _ = run(by_kernels, *asked)
    assert found[9].tokens == expected[9].tokens
    for number in range(len(TEXTS)):
        torch.testing.assert_close(floats(found[number].tokens), floats(expected[number].tokens), rtol=1e-4, atol=1e-5)


def test_a_text_past_its_deadline_is_refused(pair):
    _, engine = pair
    engine.add(ask(1, TEXTS[0], budget_ms=500), 10.0)
    engine.add(ask(2, TEXTS[0], budget_ms=5000), 10.0)
    result = engine.step(10.5)
    assert [from_wire(refusal.error).code for refusal in result.refusals] == ["deadline_exceeded"]
    runs = [*result.runs, *engine.step(10.6).runs]  # one batch ahead of the host, it only starts at first
    assert [run.request[0] for run in runs] == [2]
    assert not engine.has_work


def test_results_that_are_no_numbers_cost_their_text_alone(tmp_path):
    save_encoder(tmp_path)
    engine = load(tmp_path)
    with torch.no_grad():
        engine._runner._model.embedding.weight[77] = torch.nan
    runs, _, refusals = run(
        engine, ask(1, [CLS, 77, SEP]), ask(2, TEXTS[0]), ask(3, [77, MASK], "fill_mask"), ask(4, TEXTS[4], "fill_mask")
    )
    assert sorted(runs) == [2, 4]
    assert {number: error.code for number, error in refusals.items()} == {1: "internal_error", 3: "internal_error"}


@pytest.mark.parametrize(
    ("assignment", "param", "says"),
    [
        (ask(1, [CLS, SEP], "generate"), "model", "can embed and fill_mask"),
        (ask(1, []), "prompt", "has 0 tokens"),
        (ask(1, [7] * 41), "prompt", "has 41 tokens; give 1 to 40"),
        (ask(1, [100_000]), "prompt", "holds token id 100000"),
        (ask(1, [CLS], pooling={"pooling": "max"}), "pooling", "mean or cls"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path_factory, assignment, param, says):
    folder = tmp_path_factory.mktemp("bert")
    save_encoder(folder)
    engine = load(folder)
    with pytest.raises(InvalidRequestError, match=says) as caught:
        engine.add(assignment, 0.0)
    assert caught.value.param == param
    assert not engine.has_work


def test_the_card_says_what_it_can(tmp_path):
    save_encoder(tmp_path / "words")
    card = load(tmp_path / "words").card
    assert (card.tasks, card.embedding_size, card.mask_token_id) == (("embed", "fill_mask"), 72, MASK)
    assert (card.eos_token_ids, card.max_model_len, card.special_tokens["mask_token"]) == ((), 40, "[MASK]")
    save_encoder(tmp_path / "vectors", "roberta-pooled")
    engine = load(tmp_path / "vectors", max_model_len=20)
    assert (engine.card.tasks, engine.card.max_model_len) == (("embed",), 20)


def test_a_model_that_generates_makes_no_vectors(tmp_path):
    save_model(tmp_path)
    engine = load_engine(tmp_path, EngineConfig(kv_tokens=64))
    assert isinstance(engine, Engine)
    assert engine.card.tasks == ("generate",)
    with pytest.raises(InvalidRequestError, match="cannot embed"):
        engine.add(ask(1, [1, 2]), 0.0)


def test_a_model_with_the_head_of_a_task_is_refused_before_its_weights_are_read(tmp_path):
    make_encoder("bert-SequenceClassification").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification, whose head is not served"):
        load_engine(tmp_path, EngineConfig())


def test_warming_up_leaves_no_trace(pair):
    _, engine = pair
    before = engine.load_gauges()
    engine.warm_up()
    assert engine.load_gauges() == before
    assert not engine.has_work
