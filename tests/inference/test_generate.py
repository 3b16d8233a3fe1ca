"""`engine.generate(...)` returns what `model.generate(...)` of transformers returns for the same arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.workers.inference import init_inference
from headrace.workers.inference.shell import CACHE_NAME
from tests.inference.batches import padded
from tests.support.tiny_models import FAMILIES, make_model
from tests.support.tiny_tokenizer import END_OF_TEXT

# Windows and soft caps; ALiBi; learned positions that count real tokens; rotary ones with a tied head.
FEW = ("gemma2", "bloom", "opt", "qwen2-tied")
IDS, MASK = padded([11, 3, 1])
ONE, _ = padded([7], seed=3)
QUIET = {"pad_token_id": END_OF_TEXT}


def both(pair, name, ids=IDS, mask=MASK, **arguments):
    """What transformers returns, and what the engine returns, from the same random state."""
    results = []
    for model in pair(name):
        torch.manual_seed(5)
        mine = {key: value() if callable(value) and key == "streamer" else value for key, value in arguments.items()}
        results.append(model.generate(ids, attention_mask=mask, **QUIET | mine))
    return results


def assert_same(pair, name, **arguments):
    expected, got = both(pair, name, **arguments)
    assert torch.equal(got, expected)
    return got


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_texts_of_a_padded_batch(pair, name):
    assert_same(pair, name, max_new_tokens=32, do_sample=False)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3, "min_new_tokens": 15},
        {"use_cache": False, "max_new_tokens": 6},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_ways_of_choosing(pair, name, arguments):
    assert_same(pair, name, **{"max_new_tokens": 20, "do_sample": False} | arguments)


def test_without_a_mask_padding_counts_as_it_does_there(pair):
    assert_same(pair, "gpt2", mask=None, max_new_tokens=12)


def test_a_mask_is_told_from_padding_as_it_is_there(pair):
    ids = IDS.masked_fill(MASK == 0, 290)
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 290, "eos_token_id": 291}
    got = assert_same(pair, "gpt2", ids=ids, mask=None, **wanted)
    assert torch.equal(got, assert_same(pair, "gpt2", ids=ids, mask=MASK, **wanted))


def test_one_row_and_no_prompt_at_all(pair):
    assert_same(pair, "gpt2", ids=ONE, mask=None, max_length=20)
    assert_same(pair, "gpt2", ids=None, mask=None, max_length=20)


def test_arguments_by_name_and_as_a_config(pair):
    reference, engine = pair("llama")
    config = GenerationConfig(max_new_tokens=9, do_sample=False, **QUIET)
    expected = reference.generate(input_ids=IDS, attention_mask=MASK, generation_config=config)
    assert torch.equal(engine.generate(input_ids=IDS, attention_mask=MASK, generation_config=config), expected)
    assert torch.equal(engine.generate(inputs=IDS, attention_mask=MASK, generation_config=config), expected)


def test_end_tokens_end_rows(pair):
    free, _ = both(pair, "llama", max_new_tokens=16, eos_token_id=[])
    ends = free[0, 16].item()
    got = assert_same(pair, "llama", max_new_tokens=16, eos_token_id=ends)
    assert END_OF_TEXT in got[0, 11:]
    assert_same(pair, "llama", max_new_tokens=16, eos_token_id=ends, min_new_tokens=10)
    assert_same(pair, "llama", max_new_tokens=16, eos_token_id=ends, num_beams=3)


class Letters(LogitsProcessor):
    """Small letters only, so that the text is readable."""

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, ord("a") : ord("z") + 1] = scores[:, ord("a") : ord("z") + 1]
        return allowed


def test_stop_strings(pair, tokenizer):
    letters = {"logits_processor": LogitsProcessorList([Letters()]), "max_new_tokens": 30}
    free, _ = both(pair, "qwen2-tied", **letters)
    stop = tokenizer.decode(free[0, 16:19])
    assert len(stop) == 3
    got = assert_same(pair, "qwen2-tied", stop_strings=["\n\n", stop], tokenizer=tokenizer, **letters)
    text = tokenizer.decode(got[0, 11:], skip_special_tokens=True)
    assert text.endswith(stop)
    assert len(text) <= 8


def test_the_dictionary_with_scores(pair):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 8}
    for more in ({}, {"num_beams": 3}):
        expected, got = both(pair, "qwen2-tied", **wanted, **more)
        assert type(got) is type(expected)
        assert list(got.keys()) == list(expected.keys())
        assert torch.equal(got.sequences, expected.sequences)
        for name in ("scores", "logits"):
            for ours, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_streamers_get_every_token(pair):
    _, engine = pair("gpt2")
    streamer = Collector()
    got = engine.generate(ONE, max_new_tokens=9, streamer=streamer, **QUIET)
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended == 1


def test_text_streamers(pair, tokenizer):
    _, engine = pair("gpt2")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    got = engine.generate(ONE, max_new_tokens=9, streamer=streamer, eos_token_id=[], **QUIET)
    assert "".join(streamer) == tokenizer.decode(got[0, 7:])


class Forbid(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


def test_processors_and_criteria_of_ones_own(pair):
    got = assert_same(pair, "gpt2", max_new_tokens=12, logits_processor=LogitsProcessorList([Forbid()]))
    assert (got[:, 11:] % 2 == 1).all()
    expected, ours = both(
        pair, "gpt2", max_new_tokens=12, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(max_time=0)])
    )
    assert ours.shape == expected.shape == (3, 12)


# ------------------------------------------------------------------------------------------------------ speculation


def test_prompt_lookup(pair):
    ids = ONE.repeat(1, 3)
    assert_same(pair, "llama", ids=ids, mask=None, max_new_tokens=24, prompt_lookup_num_tokens=4)


def test_an_assistant(pair):
    _, engine = pair("llama")
    assistant = make_model("qwen2", seed=4)
    ours = init_inference(copy.deepcopy(assistant), device="cpu")
    plain = engine.generate(ONE, max_new_tokens=16, do_sample=False, **QUIET)
    for helper in (assistant, ours, engine):
        got = engine.generate(ONE, max_new_tokens=16, do_sample=False, assistant_model=helper, **QUIET)
        assert torch.equal(got, plain)


# ---------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("name", FEW)
def test_padding_on_the_right_is_passed_over(pair, name):
    reference, engine = pair(name)
    ids, mask = padded([11, 3, 1], side="right")
    for arguments in ({}, {"use_cache": False}, {"num_beams": 3}):
        got = engine.generate(ids, mask, max_new_tokens=12, do_sample=False, eos_token_id=[], **QUIET, **arguments)
        assert torch.equal(got[:, :11], ids)
        for row, length in enumerate((11, 3, 1)):
            alone = ids[row : row + 1, :length]
            expected = reference.generate(
                alone, max_new_tokens=12, do_sample=False, eos_token_id=[], **QUIET, **arguments
            )
            assert torch.equal(got[row, 11:], expected[0, length:])


def test_padding_on_the_right_cannot_be_chunked(pair):
    ids, mask = padded([11, 3], side="right")
    with pytest.raises(InvalidRequestError, match="pad on the left"):
        pair("gpt2")[1].generate(ids, mask, max_new_tokens=4, prefill_chunk_size=4, **QUIET)


# ------------------------------------------------------------------------------------------------ going on from a cache


def test_a_cache_of_generate_is_gone_on_from(pair):
    reference, engine = pair("llama")
    wanted = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": [], **QUIET}
    for model in (reference, engine):
        first = model.generate(IDS, attention_mask=MASK, **wanted)
        more = torch.cat((first.sequences, IDS[:, :3]), dim=1)
        mask = torch.cat((MASK, torch.ones(3, 9, dtype=torch.long)), dim=1)
        whole = model.generate(more, attention_mask=mask, **wanted).sequences
        name = CACHE_NAME if model is reference else "past_key_values"
        again = model.generate(more, attention_mask=mask, **{name: first[CACHE_NAME]}, **wanted).sequences
        assert torch.equal(whole, again)
        if model is reference:
            expected = whole
    assert torch.equal(whole, expected)


def test_one_prefix_serves_several_prompts(pair):
    reference, engine = pair("llama")
    prefix = engine.new_cache()
    engine(ONE, past_key_values=prefix)
    for tail in ([5], [60, 61, 62]):
        ids = torch.cat((ONE, torch.tensor([tail])), dim=1)
        got = engine.generate(ids, past_key_values=copy.deepcopy(prefix), max_new_tokens=8, **QUIET)
        assert torch.equal(got, reference.generate(ids, max_new_tokens=8, **QUIET))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": 3 * MASK}, "other values than 0 and 1"),
        ({"attention_mask": MASK[:, :4]}, "attention_mask has shape"),
        ({"attention_mask": MASK * torch.tensor([[1], [0], [1]])}, "Row 1 of attention_mask is all 0"),
        ({"position_ids": torch.arange(11)[None] + 1}, "position_ids are not"),
        ({"past_key_values": DynamicCache()}, "DynamicCache"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"inputs_embeds": torch.zeros(3, 11, 60)}, "inputs_embeds"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"input_ids": IDS}, "given twice"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pair, arguments, says):
    with pytest.raises(InvalidRequestError, match=says):
        pair("qwen2-tied")[1].generate(IDS, max_new_tokens=4, **QUIET, **arguments)


def test_positions_cannot_be_checked_behind_a_cache(pair):
    _, engine = pair("qwen2-tied")
    cache = engine(IDS).past_key_values
    with pytest.raises(InvalidRequestError, match="position_ids follow from attention_mask"):
        engine.generate(IDS, past_key_values=cache, position_ids=torch.arange(11)[None], max_new_tokens=4, **QUIET)


def test_a_typing_error_is_found_as_it_is_there(pair):
    with pytest.raises(ValueError, match="max_new_tokns"):
        pair("qwen2-tied")[1].generate(IDS, max_new_tokns=4)


def test_a_text_that_would_get_too_long_is_refused_at_once(pair):
    with pytest.raises(ContextLengthError, match=r"511 \+|would be 522 tokens, but the engine holds 512"):
        pair("gpt2")[1].generate(IDS, max_new_tokens=511, **QUIET)


def test_positions_and_defaults_that_change_nothing(pair):
    _, engine = pair("gpt2")
    plain = engine.generate(IDS, MASK, max_new_tokens=4, do_sample=False, **QUIET)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    got = engine.generate(IDS, MASK, position_ids=positions, max_new_tokens=4, do_sample=False, use_cache=True, **QUIET)
    assert torch.equal(got, plain)


def test_defaults_of_the_model_may_be_changed(tmp_path):
    engine = init_inference(make_model("gpt2"), device="cpu")
    engine.generation_config.max_new_tokens = 3
    assert engine.generate(ONE, **QUIET).shape == (1, 10)
    engine.generation_config = GenerationConfig(max_new_tokens=5, **QUIET)
    assert engine.generate(ONE).shape == (1, 12)
