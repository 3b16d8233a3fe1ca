"""The engine on tiny models: the tokens of transformers, however requests are cut, mixed, preempted or resumed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from headrace.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    ModelFilesError,
)
from headrace.messages import StreamId
from headrace.workers.engine import Engine, EngineConfig
from headrace.workers.engines import load_engine
from tests.support.engines import assign, generate, run
from tests.support.tiny_models import FAMILIES, T5_VARIANTS, save_model, save_t5
from tests.support.tiny_tokenizer import IM_END, VOCAB_SIZE

STEPS = 32


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """The folder of a model of every family, and what transformers says to PROMPTS."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_model(folder, request.param)
    return folder, [greedy(reference, text) for text in PROMPTS]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A model of transformers and its folder."""
    folder = tmp_path_factory.mktemp("one")
    return save_model(folder), folder


def load(folder, **config) -> Engine:
    settings = {"kv_tokens": 1024, "block_size": 8, "dtype": "float32"} | config
    engine = load_engine(folder, EngineConfig(**settings))
    assert isinstance(engine, Engine)
    return engine


def texts(*lens: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lens]


def greedy(model, text: list[int], steps: int = STEPS) -> list[int]:
    """What transformers says, without end tokens."""
    ids = torch.tensor([text])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, eos_token_id=None
    )
    return out[0, len(text) :].tolist()


def answer(model, text: list[int]) -> list[int]:
    """What an encoder-decoder of transformers says, without end tokens."""
    # Without a cache: transformers' own fails if the decoder has more layers than the encoder.
    out = model.generate(
        torch.tensor([text]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None, use_cache=False
    )
    return out[0, 1:].tolist()


# ------------------------------------------------------------------------------------------ tokens of transformers

PROMPTS = texts(1, 7, 8, 50, 131)

# How the same prompts can be run: together, with the prompts cut into chunks of at most 13 tokens among the decodes,
# with so little memory that streams are preempted and recomputed, one at a time, and without shared prefixes.
MODES = {
    "together": {},
    "chunked": {"max_batch_tokens": 13},
    "preempted": {"kv_tokens": 176},
    "one by one": {"max_num_seqs": 1},
    "without prefix cache": {"prefix_cache": False, "block_size": 5},
    "block of one token": {"block_size": 1},
}


@pytest.mark.parametrize("mode", list(MODES))
def test_greedy_tokens_are_those_of_transformers(family, mode):
    folder, expected = family
    engine = load(folder, **MODES[mode])
    assert generate(engine, PROMPTS, max_tokens=STEPS) == expected
    assert len({token for tokens in expected for token in tokens}) >= 5, "the model hardly says anything"
    assert (engine.load_gauges()["preemptions"] > 0) == (mode == "preempted")
    # Once more: now the prefix cache serves what it holds.
    assert generate(engine, PROMPTS, max_tokens=STEPS) == expected
    hits = engine.load_gauges()["prefix_hits"]
    assert (hits > 0) == (mode != "without prefix cache")


@pytest.fixture(scope="module", params=list(T5_VARIANTS))
def encoder_decoder(request, tmp_path_factory):
    """The folder of an encoder-decoder, and what transformers answers to PROMPTS."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_t5(folder, request.param)
    return folder, [answer(reference, text) for text in PROMPTS]


@pytest.mark.parametrize("mode", list(MODES))
def test_encoder_decoders_answer_as_in_transformers(encoder_decoder, mode):
    folder, expected = encoder_decoder
    # A source and its output lie in blocks of their own, so a little more memory is needed to hold the longest.
    engine = load(folder, **MODES[mode] | ({"kv_tokens": 192} if mode == "preempted" else {}))
    assert generate(engine, PROMPTS, max_tokens=STEPS) == expected
    assert len({token for tokens in expected for token in tokens}) >= 5, "the model hardly says anything"
    assert (engine.load_gauges()["preemptions"] > 0) == (mode == "preempted")
    assert engine.load_gauges()["prompt_tokens"] >= sum(map(len, PROMPTS))
    # The same source again, continued from some of its answer.
    outcome = run(engine, [assign(PROMPTS[3], output=expected[3][:9], max_tokens=STEPS)])[0]
    assert outcome.tokens == expected[3][9:]


@pytest.fixture
def t5(tmp_path):
    """A folder of an encoder-decoder, and its model of transformers."""
    return tmp_path, save_t5(tmp_path)


def change(path, **changes) -> None:
    """Change values of a JSON file; those that become None are left out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("in_config", [0, None])
def test_answers_begin_with_the_start_token_of_the_generation_config(t5, in_config):
    folder, reference = t5
    change(folder / "config.json", decoder_start_token_id=in_config)
    change(folder / "generation_config.json", decoder_start_token_id=7)
    ids = torch.tensor([PROMPTS[1]])
    out = reference.generate(ids, decoder_start_token_id=7, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    assert generate(load(folder), PROMPTS[1:2], max_tokens=STEPS) == [out[0, 1:].tolist()]


@pytest.mark.parametrize("wrong", [None, VOCAB_SIZE, -1, [0], "pad"])
def test_an_encoder_decoder_without_a_start_token_is_refused(t5, wrong):
    folder, _ = t5
    change(folder / "config.json", decoder_start_token_id=None)
    change(folder / "generation_config.json", decoder_start_token_id=wrong)
    with pytest.raises(ModelFilesError, match=r"T5ForCond.*decoder_start_token_id.*nobody can.*Put.*generation_config"):
        load(folder)


@pytest.mark.parametrize("cut", [1, 15, 31])
def test_a_resumed_stream_goes_on_as_it_would_have(one, cut):
    reference, folder = one
    (text,) = texts(20)
    expected = greedy(reference, text)
    outcome = run(load(folder), [assign(text, output=expected[:cut], max_tokens=STEPS)])[0]
    assert outcome.tokens == expected[cut:]
    assert outcome.reason == "length"


@pytest.mark.parametrize("settings", [{}, {"top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.3, "min_p": 0.05}])
def test_a_drawn_stream_is_the_same_alone_in_company_and_resumed(one, settings):
    sampling = {"temperature": 1.2, "seed": 11, "max_tokens": STEPS} | settings
    text, *others = texts(20, 9, 33, 64)
    alone = run(load(one[1]), [assign(text, **sampling)])[0].tokens
    company = [assign(other, request=9 + n, temperature=0.7, max_tokens=50) for n, other in enumerate(others)]
    assert run(load(one[1], max_batch_tokens=16), [*company, assign(text, **sampling)])[-1].tokens == alone
    resumed = run(load(one[1]), [assign(text, output=alone[:13], **sampling)])[0].tokens
    assert alone[:13] + resumed == alone
    assert run(load(one[1]), [assign(text, **(sampling | {"seed": 12}))])[0].tokens != alone


def test_choices_draw_differently_and_share_their_prompt(one):
    engine = load(one[1])
    (text,) = texts(40)
    outcomes = run(engine, [assign(text, choice=n, temperature=1.0, seed=3, max_tokens=12) for n in range(4)])
    assert len({tuple(outcome.tokens) for outcome in outcomes}) == 4
    assert sum(outcome.cached > 0 for outcome in outcomes) == 3


def test_a_seed_that_nobody_gave_belongs_to_the_request(one):
    (text,) = texts(10)
    first, again, other = (
        run(load(one[1]), [assign(text, request=request, temperature=1.0)])[0].tokens for request in (1, 1, 2)
    )
    assert first == again != other


def test_logprobs_are_those_of_transformers(one):
    reference, folder = one
    (text,) = texts(30)
    outcome = run(load(folder), [assign(text, max_tokens=8, logprobs=3)])[0]
    whole = torch.tensor([text + outcome.tokens])
    expected = reference(whole).logits[0, len(text) - 1 : -1].detach().log_softmax(-1)
    for token, (logprob, top), row in zip(outcome.tokens, outcome.logprobs, expected, strict=True):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [id for id, _ in top] == row.topk(3).indices.tolist()
        assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


# ----------------------------------------------------------------------------------------------------- how it ends


def test_end_tokens_end_a_text_and_are_no_part_of_it(one):
    engine = load(one[1])
    (text,) = texts(12)
    tokens = run(engine, [assign(text, max_tokens=20)])[0].tokens
    stop = tokens[7]
    cut = tokens.index(stop)
    outcome = run(engine, [assign(text, max_tokens=20, stop_token_ids=[stop])])[0]
    assert (outcome.tokens, outcome.reason) == (tokens[:cut], "stop")
    late = run(engine, [assign(text, max_tokens=20, stop_token_ids=[stop], min_tokens=cut + 3)])[0]
    assert len(late.tokens) >= cut + 3
    assert stop not in late.tokens[: cut + 3]


def test_the_models_own_end_token_counts_unless_it_is_to_be_ignored(one):
    engine = load(one[1])
    (text,) = texts(12)
    bias = {"logit_bias": [[IM_END, 100.0]], "max_tokens": 3}
    assert run(engine, [assign(text, ignore_eos=False, **bias)])[0].reason == "stop"
    assert run(engine, [assign(text, **bias)])[0].tokens == [IM_END] * 3


def test_a_stream_that_holds_all_its_tokens_ends_at_once(one):
    outcome = run(load(one[1]), [assign([1, 2], output=[3] * 5, max_tokens=5)])[0]
    assert (outcome.tokens, outcome.reason) == ([], "length")


def test_max_tokens_defaults_to_what_the_context_holds(one):
    engine = load(one[1], max_model_len=40)
    assert engine.card.max_model_len == 40
    outcome = run(engine, [assign(texts(30)[0], max_tokens=None)])[0]
    assert len(outcome.tokens) == 10


def test_a_revoked_stream_says_nothing_more(one):
    engine = load(one[1])
    engine.add(assign([1, 2, 3], request=1), 0.0)
    engine.add(assign([4, 5, 6], request=2), 0.0)
    engine.step(0.0)
    engine.revoke(StreamId((1).to_bytes(16, "big"), 0, 1))
    assert {run_.request[-1] for run_ in engine.step(0.0).runs} == {2}
    engine.revoke_all()
    assert engine.running() == ()
    assert engine.step(0.0).runs == []
    assert not engine.has_work
    engine.validate()
    gauges = engine.load_gauges()
    assert gauges["kv_blocks_free"] == gauges["kv_blocks_total"]


def test_attempts_only_grow(one):
    engine = load(one[1])
    engine.add(assign([1, 2, 3], attempt=4), 0.0)
    engine.add(assign([1, 2, 3], attempt=3), 0.0)
    assert [stream.attempt for stream in engine.running()] == [4]
    engine.revoke(StreamId((0).to_bytes(16, "big"), 0, 3))
    assert [stream.attempt for stream in engine.running()] == [4]
    engine.add(assign([1, 2, 3], attempt=5), 0.0)
    assert [stream.attempt for stream in engine.running()] == [5]


def test_a_deadline_ends_its_stream_alone(one):
    engine = load(one[1])
    late = assign([1, 2, 3], request=1, budget_ms=500, max_tokens=100)
    engine.add(late, 10.0)
    engine.add(assign([1, 2, 3], request=2, max_tokens=100), 10.0)
    first = engine.step(10.3)  # one step ahead, it only starts here
    assert len(first.runs or engine.step(10.4).runs) == 2
    result = engine.step(10.6)
    assert [refusal.error["code"] for refusal in result.refusals] == [DeadlineExceededError.code]
    assert len(result.runs) == 1


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("bad", "error", "param"),
    [
        ({"prompt": []}, InvalidRequestError, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, InvalidRequestError, "prompt"),
        ({"prompt": [1], "output": [2**32 - 1]}, InvalidRequestError, "output"),
        ({"prompt": [1], "stop_token_ids": [VOCAB_SIZE]}, InvalidRequestError, "stop_token_ids"),
        ({"prompt": [1], "logit_bias": [[VOCAB_SIZE, 1.0]]}, InvalidRequestError, "logit_bias"),
        ({"prompt": [1], "temperature": -1.0}, InvalidRequestError, "temperature"),
        ({"prompt": [1] * 512}, ContextLengthError, "prompt"),
        ({"prompt": [1] * 500, "max_tokens": 13}, ContextLengthError, "max_tokens"),
    ],
)
def test_a_bad_request_is_refused_by_the_name_of_its_field(one, bad, error, param):
    engine = load(one[1])
    bad = dict(bad)
    with pytest.raises(error) as caught:
        engine.add(assign(bad.pop("prompt"), **bad), 0.0)
    assert caught.value.param == param
    assert not engine.has_work


def test_what_fits_the_model_but_not_the_cache_is_refused(one):
    engine = load(one[1], kv_tokens=64)
    assert engine.card.max_model_len == 64
    with pytest.raises(ContextLengthError, match="64"):
        engine.add(assign([1] * 60, max_tokens=16), 0.0)


def test_a_context_longer_than_the_models_is_refused(one):
    with pytest.raises(ConfigError, match="was made for 512 tokens"):
        load(one[1], max_model_len=513)


def test_logits_that_are_no_numbers_cost_only_their_own_stream(tmp_path):
    save_model(tmp_path, "qwen2")  # whose head is no part of the embedding
    engine = load(tmp_path)
    healthy = [assign([5, 6], request=2, max_tokens=6), assign(texts(40)[0], request=3)]
    expected = [outcome.tokens for outcome in run(engine, healthy)]
    engine._runner.model.embedding.weight[77] = math.nan
    outcomes = run(engine, [*healthy, assign([77, 5], request=1)])
    assert [outcome.tokens for outcome in outcomes[:2]] == expected
    assert isinstance(outcomes[2].error, InternalError)
    # Its block held NaN; whoever gets it next must not see it.
    for _ in range(3):
        assert [outcome.tokens for outcome in run(engine, healthy)] == expected


# ------------------------------------------------------------------------------------------------------- all of it


def test_warming_up_leaves_no_trace(one):
    engine = load(one[1])
    before = engine.load_gauges()
    engine.warm_up()
    assert not engine.has_work
    made = {"prefix_queries": 0, "graphs": 0}
    assert engine.load_gauges() | made == before | made
    assert engine.steps > 0


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3", 2)])
def test_positions_are_reserved_once_and_no_more_than_the_engine_serves(tmp_path, family, kinds):
    reference = save_model(tmp_path, family, max_position_embeddings=1_000_000)
    engine = load(tmp_path, max_model_len=300)
    tables = engine._runner.model._tables
    before = dict(tables)
    assert [len(table) for table in before.values()] == [300] * kinds
    (text,) = texts(290)
    assert generate(engine, [text], max_tokens=10) == [greedy(reference, text, 10)]
    assert all(tables[kind] is table for kind, table in before.items())


def test_random_traffic_ends_with_an_empty_engine(one):
    reference, folder = one
    engine = load(folder, kv_tokens=256, max_num_seqs=5, max_batch_tokens=24)
    generator = torch.Generator().manual_seed(5)
    prompts = texts(*torch.randint(1, 60, (25,), generator=generator).tolist())
    expected = {n: greedy(reference, text, 20) for n, text in enumerate(prompts)}
    got: dict[int, list[int]] = {n: [] for n in expected}
    left = list(expected)
    revoked = set()
    while left or engine.has_work:
        if left and torch.rand((), generator=generator) < 0.4:
            number = left.pop()
            engine.add(assign(prompts[number], request=number, max_tokens=20), 0.0)
        if engine.running() and torch.rand((), generator=generator) < 0.03:
            stream = engine.running()[0]
            revoked.add(int.from_bytes(stream.request, "big"))
            engine.revoke(stream)
        for run_ in engine.step(0.0).runs:
            number = int.from_bytes(run_.request, "big")
            assert run_.first == len(got[number])
            got[number] += memoryview(run_.tokens).cast("I").tolist()
        engine.validate()
    assert revoked
    for number, tokens in expected.items():
        assert got[number] == tokens[: len(got[number])]
        assert number in revoked or got[number] == tokens
    gauges = engine.load_gauges()
    assert (gauges["running"], gauges["waiting"]) == (0, 0)
    assert gauges["kv_blocks_free"] == gauges["kv_blocks_total"]
