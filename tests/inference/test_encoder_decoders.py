"""Encoder-decoders: `engine(...)`, its cache and its streams give what transformers gives on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from headrace.errors import ContextLengthError, InvalidRequestError, UnsupportedModelError
from headrace.workers.inference import init_inference
from headrace.workers.inference.cache import BLOCK_SIZE
from tests.inference.batches import padded
from tests.support.tiny_models import T5_VARIANTS, make_t5, save_t5

IDS, MASK = padded([21, 3, 1])
RIGHT_IDS, RIGHT_MASK = padded([21, 3, 1], side="right")
TARGETS, TARGET_MASK = padded([9, 4, 1], seed=3)
PROMPTS = [[5, 60, 7], [200], list(range(40, 70))]


def near(got, expected, kept=...):
    torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=1e-4 * float(expected.abs().max()))


# -------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(("ids", "mask"), [(IDS, MASK), (RIGHT_IDS, RIGHT_MASK)], ids=["left", "right"])
@pytest.mark.parametrize("name", T5_VARIANTS)
@torch.no_grad()
def test_logits_and_states_of_a_padded_batch(pair, name, ids, mask):
    reference, engine = pair(name)
    expected = reference(
        ids, attention_mask=mask, decoder_input_ids=TARGETS, decoder_attention_mask=TARGET_MASK, use_cache=False
    )
    got = engine(ids, mask, TARGETS, TARGET_MASK)
    assert type(got) is type(expected)
    near(got.logits, expected.logits, TARGET_MASK == 1)
    near(got.encoder_last_hidden_state, expected.encoder_last_hidden_state, mask == 1)
    assert not got.logits[TARGET_MASK == 0].any()
    assert not got.encoder_last_hidden_state[mask == 0].any()
    got.past_key_values.validate()


@torch.no_grad()
def test_the_output_is_that_of_transformers(pair):
    reference, engine = pair("t5")
    expected, got = reference(IDS, decoder_input_ids=TARGETS), engine(IDS, decoder_input_ids=TARGETS)
    assert list(got.keys()) == list(expected.keys())
    near(got.logits, expected.logits)
    for more in ({}, {"use_cache": False}):
        arguments = {"decoder_input_ids": TARGETS, "return_dict": False, **more}
        assert len(engine(IDS, **arguments)) == len(reference(IDS, **arguments))


@torch.no_grad()
def test_a_text_in_parts_over_one_cache(pair):
    reference, engine = pair("t5-deep-encoder")
    expected = reference(IDS, attention_mask=MASK, decoder_input_ids=TARGETS, decoder_attention_mask=TARGET_MASK)
    cache, parts, states = None, [], None
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        source = {"input_ids": IDS} if cache is None else {"encoder_outputs": (states,)} if stop == 5 else {}
        output = engine(
            **source,
            attention_mask=MASK,
            decoder_input_ids=TARGETS[:, start:stop],
            decoder_attention_mask=TARGET_MASK[:, :stop],
            past_key_values=cache,
        )
        assert (output.encoder_last_hidden_state is None) is (not source)
        cache, states = output.past_key_values, output.encoder_last_hidden_state
        cache.validate()
        parts.append(output.logits)
    near(torch.cat(parts, dim=1), expected.logits, TARGET_MASK == 1)


@torch.no_grad()
def test_states_may_be_given(pair):
    reference, engine = pair("t5")
    states = reference.encoder(IDS, attention_mask=MASK)
    expected = engine(IDS, MASK, TARGETS)
    for given in (states, (states.last_hidden_state,), BaseModelOutput(states.last_hidden_state)):
        got = engine(attention_mask=MASK, decoder_input_ids=TARGETS, encoder_outputs=given)
        near(got.logits, expected.logits)
        near(got.encoder_last_hidden_state, expected.encoder_last_hidden_state, MASK == 1)


@torch.no_grad()
def test_only_the_wanted_logits_are_computed(pair):
    engine = pair("t5")[1]
    whole = engine(IDS, MASK, TARGETS, TARGET_MASK).logits
    near(engine(IDS, MASK, TARGETS, TARGET_MASK, logits_to_keep=1).logits, whole[:, -1:])
    kept = torch.tensor([7, 0])
    near(engine(IDS, MASK, TARGETS, TARGET_MASK, logits_to_keep=kept).logits, whole[:, kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", T5_VARIANTS)
@torch.no_grad()
def test_narrow_logits_are_as_near_to_float32_as_those_of_transformers(name, dtype):
    reference = make_t5(name)
    engine = init_inference(copy.deepcopy(reference), dtype=dtype, device="cpu")
    ids, targets = padded([60] * 4)[0], padded([40] * 4, seed=3)[0]
    exact = reference(ids, decoder_input_ids=targets, use_cache=False).logits
    theirs = reference.to(dtype)(ids, decoder_input_ids=targets, use_cache=False).logits
    ours = engine(ids, decoder_input_ids=targets).logits
    assert ours.dtype is dtype
    error, their_error = ((logits.float() - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert error < 1.2 * their_error


# ------------------------------------------------------------------------------------------------------------ the cache


def test_each_source_is_computed_once_and_shared(pair, monkeypatch):
    _, engine = pair("t5")
    kept = []
    for block in engine.module.blocks:
        monkeypatch.setattr(
            block.cross,
            "remember",
            lambda states, *rest, own=block.cross.remember: (kept.append(states), own(states, *rest)),
        )
    out = engine.generate(IDS, MASK, max_new_tokens=6, num_beams=4, return_dict_in_generate=True)
    assert [len(states) for states in kept] == [25] * len(engine.module.blocks)  # 21 + 3 + 1 tokens, no beam twice
    cache = out.past_key_values
    cache.validate()
    assert cache.batch_size == 12
    assert len({tuple(table) for table in cache.source_tables}) == 3
    assert sum(-(-length // BLOCK_SIZE) for length in (21, 3, 1)) + 12 >= cache.num_held


@torch.no_grad()
def test_rows_are_reordered_repeated_and_cropped(pair):
    _, engine = pair("t5")
    first = engine(IDS, MASK, TARGETS[:, :4]).past_key_values
    expected = engine(IDS, MASK, TARGETS[:, :6]).logits[:, 4:]
    copied = copy.deepcopy(first)
    copied.batch_repeat_interleave(2)
    copied.reorder_cache(torch.tensor([5, 2, 0, 1]))
    copied.validate()
    rows = torch.tensor([2, 1, 0, 0])
    near(engine(decoder_input_ids=TARGETS[rows, 4:6], past_key_values=copied).logits, expected[rows])
    copied.crop(-2)
    copied.validate()
    near(engine(decoder_input_ids=TARGETS[rows, 4:6], past_key_values=copied).logits, expected[rows])
    near(engine(decoder_input_ids=TARGETS[:, 4:6], past_key_values=first).logits, expected)
    copied.reset()
    assert not copied.source_lens
    assert not copied.num_held
    copied.validate()


def test_a_cache_of_generate_is_gone_on_from(pair):
    _, engine = pair("t5")
    whole = engine.generate(IDS, MASK, max_new_tokens=9, do_sample=False)
    first = engine.generate(IDS, MASK, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    rest = engine.generate(
        IDS,
        MASK,
        decoder_input_ids=first.sequences,
        decoder_attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=5,
        do_sample=False,
    )
    assert torch.equal(rest, whole)


# -------------------------------------------------------------------------------------------------------------- streams


def expected_texts(reference, count, **arguments):
    return [
        reference.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, **arguments)[0, 1:].tolist()
        for prompt in PROMPTS
    ]


def test_streams_are_the_tokens_of_transformers(pair):
    reference, engine = pair("t5-deep-encoder")
    expected = expected_texts(reference, 12, eos_token_id=None)
    settings = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    streams = [engine.stream(prompt, **settings) for prompt in PROMPTS]
    got = [[next(stream)] for stream in streams]  # all of them are under way at once
    for stream, tokens in zip(streams, got, strict=True):
        tokens += stream
        assert stream.finish_reason == "length"
    assert got == expected
    assert engine.generate_many(PROMPTS, **settings) == expected
    assert list(engine.stream(torch.tensor([PROMPTS[0]]), **settings)) == expected[0]


def test_text_in_text_out(tmp_path, tokenizer):
    reference = save_t5(tmp_path, "t5-v1.1")
    engine = init_inference(tmp_path, device="cpu")
    engine.tokenizer = tokenizer
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "use_cache": False}
    expected = reference.generate(ids, **settings)[0, 1:]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    pieces = list(engine.stream("hello world", max_tokens=12, temperature=0, ignore_eos=True))
    assert "".join(pieces) == text
    assert engine.generate_many(["hello world"], max_tokens=12, temperature=0, ignore_eos=True) == [text]
    assert torch.equal(engine.generate(ids, **settings | {"use_cache": True})[0, 1:], expected)


def test_streams_begin_with_the_start_token_that_is_set(pair):
    reference = pair("t5")[0]
    engine = init_inference(copy.deepcopy(reference), device="cpu")
    engine.generation_config.decoder_start_token_id = 9
    settings = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = expected_texts(reference, 12, eos_token_id=None, decoder_start_token_id=9)
    assert engine.generate_many(PROMPTS, **settings) == expected
    assert expected != expected_texts(reference, 12, eos_token_id=None)
    engine = init_inference(copy.deepcopy(reference), device="cpu")
    engine.generation_config.decoder_start_token_id = [9, 8]
    with pytest.raises(InvalidRequestError, match=r"decoder_start_token_id is \[9, 8\], but a stream begins with one"):
        engine.stream([5])


# --------------------------------------------------------------------------------------------- what cannot be honoured


def test_without_a_start_token():
    module = make_t5("t5", decoder_start_token_id=None)
    module.generation_config.decoder_start_token_id = None
    expected = copy.deepcopy(module).generate(IDS, attention_mask=MASK, decoder_start_token_id=0, max_new_tokens=5)
    engine = init_inference(module, device="cpu")
    says = r"T5ForConditionalGeneration has no decoder_start_token_id.*Give decoder_start_token_id=.*pad_token_id, 0"
    for attempt in (
        lambda: engine.generate(IDS, MASK, max_new_tokens=5),
        lambda: engine.generate(IDS, MASK, generation_config=GenerationConfig(max_new_tokens=5)),
        lambda: engine.stream([5, 6]),
        lambda: engine.generate_many([[5, 6]]),
    ):
        with pytest.raises(InvalidRequestError, match=says) as caught:
            attempt()
        assert caught.value.param == "decoder_start_token_id"
    assert torch.equal(engine.generate(IDS, MASK, decoder_start_token_id=0, max_new_tokens=5), expected)
    config = GenerationConfig(max_new_tokens=5, decoder_start_token_id=0)
    assert torch.equal(engine.generate(IDS, MASK, generation_config=config), expected)
    engine.generation_config.decoder_start_token_id = 0
    assert torch.equal(engine.generate(IDS, MASK, max_new_tokens=5), expected)
    assert engine.generate_many([[5, 6]], max_tokens=3, ignore_eos=True)[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": MASK * 2}, "attention_mask holds other values than 0 and 1"),
        ({"attention_mask": MASK[:, :4]}, r"attention_mask has shape \[3, 4\]; give \[3, 21\]"),
        ({"attention_mask": MASK * torch.tensor([[1], [0], [1]])}, "Row 1 of attention_mask is all 0"),
        ({"decoder_attention_mask": TARGET_MASK * 2}, "decoder_attention_mask holds other values"),
        ({"decoder_attention_mask": TARGET_MASK[:, :4]}, r"decoder_attention_mask has shape \[3, 4\]; give \[3, 9\]"),
        ({"decoder_input_ids": TARGETS.float()}, r"decoder_input_ids is torch\.float32; give"),
        ({"decoder_input_ids": TARGETS + 302}, r"decoder_input_ids holds \d+, but the model has ids 0 to 301"),
        ({"encoder_outputs": torch.zeros(3, 21, 40)}, "encoder_outputs is Tensor without states"),
        ({"encoder_outputs": (torch.zeros(3, 21, 41),)}, r"states of shape \[3, 21, 41\]; give \[rows, tokens, 40\]"),
        ({"past_key_values": DynamicCache()}, "DynamicCache"),
        ({"inputs_embeds": torch.zeros(3, 21, 40)}, "inputs_embeds cannot be given"),
        ({"decoder_inputs_embeds": torch.zeros(3, 9, 40)}, "decoder_inputs_embeds cannot be given"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pair, arguments, says):
    engine = pair("t5")[1]
    with pytest.raises(InvalidRequestError, match=says):
        engine(IDS, **{"attention_mask": MASK, "decoder_input_ids": TARGETS} | arguments)
    with pytest.raises(InvalidRequestError, match=says):
        engine.generate(IDS, max_new_tokens=3, **{"attention_mask": MASK, "decoder_input_ids": TARGETS} | arguments)


def test_more_that_forward_refuses(pair):
    engine = pair("t5")[1]
    for arguments, says in (
        ({"input_ids": IDS}, "decoder_input_ids are missing.*or call generate"),
        ({"decoder_input_ids": TARGETS}, "There is no source; give input_ids, or encoder_outputs"),
        ({"input_ids": IDS + 302, "decoder_input_ids": TARGETS}, r"input_ids holds \d+, but the model has ids 0 to"),
        ({"input_ids": IDS, "decoder_input_ids": TARGETS, "labels": TARGETS}, "labels are for training"),
        ({"input_ids": IDS, "decoder_input_ids": TARGETS, "output_attentions": True}, "output_attentions"),
        ({"input_ids": IDS[:2], "decoder_input_ids": TARGETS}, "decoder_input_ids has 3 rows, but the cache has 2"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            engine(**arguments)


def test_more_that_generate_refuses(pair):
    engine = pair("t5")[1]
    wrong = (torch.zeros(3, 20, 40),)
    for arguments, says in (
        ({}, "There is no prompt; give input_ids"),
        ({"input_ids": IDS, "encoder_outputs": wrong}, "states of 3 rows of 20 tokens, but input_ids has shape"),
        ({"input_ids": IDS, "output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"input_ids": IDS, "cache_implementation": "static"}, "cache_implementation is 'static'"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            engine.generate(max_new_tokens=3, **arguments)


def test_a_cache_of_other_sources_is_refused(pair):
    engine = pair("t5")[1]
    cache = engine(IDS, MASK, TARGETS).past_key_values
    grown = engine(IDS, MASK, torch.cat((TARGETS, TARGETS[:, :1]), dim=1))
    for ids, mask in ((IDS, None), (IDS[:, :20], None), (IDS[:, 1:], MASK[:, 1:])):
        with pytest.raises(InvalidRequestError, match="The cache has keys and values of other sources"):
            engine(ids, mask, TARGETS, past_key_values=cache)
        with pytest.raises(InvalidRequestError, match="The cache has keys and values of other sources"):
            engine.generate(ids, mask, decoder_input_ids=TARGETS, past_key_values=cache, max_new_tokens=3)
    with pytest.raises(InvalidRequestError, match="The cache has keys and values of other sources"):
        engine(attention_mask=torch.ones_like(MASK), decoder_input_ids=TARGETS[:, :1], past_key_values=cache)
    cache.validate()
    near(engine(decoder_input_ids=TARGETS[:, :1], past_key_values=cache).logits, grown.logits[:, -1:])


def test_source_and_text_together_are_bounded():
    engine = init_inference(make_t5("t5"), device="cpu", max_tokens=30)
    assert engine.generate(IDS, MASK, max_length=9, eos_token_id=None).shape == (3, 9)
    with pytest.raises(ContextLengthError, match="would be 31 tokens, but the engine holds 30"):
        engine.generate(IDS, MASK, max_length=10)
    with pytest.raises(ContextLengthError, match="31 tokens, but the engine reads 30"):
        engine.generate(torch.ones(1, 31, dtype=torch.long), max_length=3)
    cache = engine.new_cache()
    with pytest.raises(ContextLengthError, match="31 tokens, but the engine holds 30"):
        engine(IDS, MASK, torch.ones(3, 10, dtype=torch.long), past_key_values=cache)
    assert (cache.num_held, cache.source_lens) == (0, [])
    with pytest.raises(ContextLengthError):
        engine.stream(list(range(25)), max_tokens=10)


def test_the_weights_are_moved():
    module = make_t5("t5-v1.1")
    engine = init_inference(module, device="cpu")
    assert all(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(UnsupportedModelError, match="moved into an engine by init_inference"):
        module(IDS, decoder_input_ids=TARGETS)
    assert engine.report().left_alone.keys() == {"embedding"}


def test_the_report(pair):
    engine = pair("t5-deep-encoder")[1]
    report = engine.report()
    assert (report.layers_replaced, report.layers_total, report.encoder_layers) == (6, 6, 4)
    assert report.kv_bytes_per_token == 2 * 2 * 60 * 4
    assert set(report.slots) == {"qkv", "rotary", "attention", "cross attention", "out", "norm", "mlp", "head"}
    assert "full_attention, in both directions" in report.slots["attention"]
    assert "paged_attention, 5 heads of 12, relative bias in 8 buckets" in report.slots["attention"]
    assert "computed once a source and cached" in report.slots["cross attention"]
    assert "6 of 6 replaced (4 of the encoder, 2 of the decoder)" in str(report)
    shown = repr(engine)
    for part in ("(0-1): 2 x Block(", "(0-3): 4 x Block(", "(cross): CrossAttention("):
        assert part in shown
    assert engine.can_generate()
