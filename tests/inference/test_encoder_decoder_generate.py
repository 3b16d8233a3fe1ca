"""`engine.generate(...)` of encoder-decoders returns what transformers returns for the same arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from headrace.workers.inference import init_inference
from tests.inference.batches import padded
from tests.support.tiny_models import T5_VARIANTS, make_t5
from tests.support.tiny_tokenizer import END_OF_TEXT

IDS, MASK = padded([21, 3, 1])
RIGHT_IDS, RIGHT_MASK = padded([21, 3, 1], side="right")
TARGETS, _ = padded([9, 4, 1], seed=3)


def both(pair, name, ids=IDS, mask=MASK, **arguments):
    """What transformers returns, and what the engine returns, from the same random state."""
    reference, engine = pair(name)
    # transformers' own cache has as many layers as the encoder, too few for a deeper decoder.
    own = {"use_cache": False} if name == "t5-v1.1" else {}
    results = []
    for model, more in ((reference, own), (engine, {})):
        torch.manual_seed(5)
        results.append(model.generate(ids, attention_mask=mask, **arguments | more))
    return results


def assert_same(pair, name="t5", **arguments):
    expected, got = both(pair, name, **arguments)
    assert torch.equal(got, expected)
    return got


@pytest.mark.parametrize("name", T5_VARIANTS)
def test_greedy_texts_and_beams_of_a_padded_batch(pair, name):
    assert_same(pair, name, max_new_tokens=32, do_sample=False)
    assert_same(pair, name, max_new_tokens=32, num_beams=4, num_return_sequences=3)
    assert_same(pair, name, ids=RIGHT_IDS, mask=RIGHT_MASK, max_new_tokens=32, num_beams=3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "num_return_sequences": 2},
        {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2, "min_new_tokens": 15},
        {"use_cache": False, "max_new_tokens": 6, "num_beams": 2},
        {"max_length": 9, "max_new_tokens": None},
        {"decoder_start_token_id": 7},
        {"decoder_input_ids": TARGETS[:, :1].expand(3, 1)},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_ways_of_choosing(pair, arguments):
    assert_same(pair, **{"max_new_tokens": 20, "do_sample": False} | arguments)


def test_one_row_without_a_mask(pair):
    assert_same(pair, ids=IDS[:1], mask=None, max_new_tokens=12)
    assert_same(pair, mask=None, max_new_tokens=12)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_decoder_goes_on_with_what_it_has_written(pair, beams):
    begun = torch.cat((torch.zeros(3, 1, dtype=torch.long), TARGETS[:, :4]), dim=1)
    got = assert_same(pair, decoder_input_ids=begun, max_new_tokens=8, num_beams=beams)
    assert torch.equal(got[:, :5], begun)
    padded_begun = torch.tensor([[0, 9, 8, 7], [0, 0, 0, 6], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    wanted = {"decoder_input_ids": padded_begun, "decoder_attention_mask": mask, "max_new_tokens": 8}
    assert_same(pair, num_beams=beams, **wanted)


@pytest.mark.parametrize(
    ("begun", "mask"),
    [
        ([[0, 9, 8, 7], [0, 6, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
        # The loop puts the start token before what does not begin with it, here also before padding.
        ([[9, 8, 7], [2, 2, 6], [2, 4, 6]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]]),
    ],
    ids=["right", "left, without the start token"],
)
def test_padding_of_what_the_decoder_has_written_is_passed_over(pair, begun, mask):
    reference, engine = pair("t5")
    begun, mask = torch.tensor(begun), torch.tensor(mask)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    got = engine.generate(IDS, MASK, decoder_input_ids=begun, decoder_attention_mask=mask, **settings)
    for row, source in enumerate(IDS):
        written = begun[row : row + 1, mask[row] == 1]
        expected = reference.generate(source[None, MASK[row] == 1], decoder_input_ids=written, **settings)
        assert torch.equal(got[row, -8:], expected[0, -8:])


@pytest.mark.parametrize("beams", [1, 3])
def test_states_given_to_generate(pair, beams):
    reference, engine = pair("t5")
    with torch.no_grad():
        states = reference.encoder(IDS, attention_mask=MASK)
    shape = states.last_hidden_state.shape
    plain = assert_same(pair, max_new_tokens=10, num_beams=beams)
    for given in (states, (states.last_hidden_state,)):
        wanted = {"attention_mask": MASK, "encoder_outputs": given, "max_new_tokens": 10, "num_beams": beams}
        assert torch.equal(engine.generate(**wanted), plain)
        assert torch.equal(engine.generate(IDS, **wanted), plain)
    assert states.last_hidden_state.shape == shape


def test_arguments_by_name_and_as_a_config(pair):
    reference, engine = pair("t5")
    config = GenerationConfig(max_new_tokens=9, do_sample=False, decoder_start_token_id=3, eos_token_id=END_OF_TEXT)
    expected = reference.generate(input_ids=IDS, attention_mask=MASK, generation_config=config)
    assert torch.equal(engine.generate(input_ids=IDS, attention_mask=MASK, generation_config=config), expected)
    assert (expected[:, 0] == 3).all()


def test_end_tokens_end_rows(pair):
    free = assert_same(pair, max_new_tokens=16)
    ends = free[0, 5].item()
    assert_same(pair, max_new_tokens=16, eos_token_id=ends)
    assert_same(pair, max_new_tokens=16, eos_token_id=ends, num_beams=3)


def test_stop_strings_and_criteria(pair, tokenizer):
    free = assert_same(pair, max_new_tokens=20, do_sample=True)
    stop = tokenizer.decode(free[0, 4:5])
    got = assert_same(pair, max_new_tokens=20, do_sample=True, stop_strings=[stop], tokenizer=tokenizer)
    assert stop in tokenizer.decode(got[0])
    stopped = StoppingCriteriaList([MaxTimeCriteria(max_time=0)])
    assert assert_same(pair, max_new_tokens=12, stopping_criteria=stopped).shape == (3, 2)


class Odd:
    """Odd tokens only."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


def test_processors_of_ones_own(pair):
    got = assert_same(pair, max_new_tokens=12, eos_token_id=None, logits_processor=LogitsProcessorList([Odd()]))
    assert (got[:, 1:] % 2 == 1).all()


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_streamers_get_every_token(pair):
    streamer = Collector()
    got = pair("t5")[1].generate(IDS[:1], max_new_tokens=9, streamer=streamer)
    assert streamer.tokens == got[0].tolist()
    assert streamer.ended == 1


def test_the_dictionary_with_scores(pair):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 8}
    for more in ({}, {"num_beams": 3}):
        expected, got = both(pair, "t5", **wanted, **more)
        assert type(got) is type(expected)
        assert list(got.keys()) == list(expected.keys())
        assert torch.equal(got.sequences, expected.sequences)
        for name in ("scores", "logits"):
            for ours, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_speculation(pair):
    one = {"ids": IDS[:1], "mask": None, "max_new_tokens": 20, "do_sample": False}
    plain = assert_same(pair, "t5", **one)
    assert torch.equal(assert_same(pair, "t5", prompt_lookup_num_tokens=3, **one), plain)
    engine = pair("t5")[1]
    helper = make_t5("t5", seed=4)
    for assistant in (helper, init_inference(copy.deepcopy(helper), device="cpu"), engine):
        got = engine.generate(IDS[:1], max_new_tokens=20, do_sample=False, assistant_model=assistant)
        assert torch.equal(got, plain)
