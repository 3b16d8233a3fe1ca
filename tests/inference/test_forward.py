"""`engine(...)` against the model of transformers: logits of all families, with padding on both sides, with a cache."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache

from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.workers.inference import init_inference
from tests.inference.batches import padded, positions_of
from tests.support.tiny_models import FAMILIES, make_model, save_model

IDS, MASK = padded([4, 9])


def logits_of(reference, ids, mask, **more):
    """What transformers computes, told the positions that follow from the mask if it can be told."""
    if "position_ids" in inspect.signature(reference.forward).parameters:
        more["position_ids"] = positions_of(mask)
    with torch.no_grad():
        return reference(ids, attention_mask=mask, **more).logits


def assert_near(ours, theirs, mask):
    """Equal where there are tokens, zero where there is padding."""
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], rtol=0, atol=1e-4 * scale)
    assert not ours[mask == 0].any()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_transformers(pair, name, side):
    reference, engine = pair(name)
    # Longer than any window, as long as a block, one token, and padding that no row needs.
    ids, mask = padded([40, 16, 1, 7], side=side, spare=2)
    assert_near(engine(ids, mask).logits, logits_of(reference, ids, mask), mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cached_continuation_has_the_logits_of_the_whole(pair, name):
    reference, engine = pair(name)
    ids, mask = padded([37, 20, 3])
    expected = logits_of(reference, ids, mask)
    cache, parts = None, []
    for start, stop in ((0, 30), (30, 31), (31, 36), (36, 37)):
        output = engine(ids[:, start:stop], mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        cache.validate()
        parts.append(output.logits)
    assert cache.get_seq_length() == 37
    assert_near(torch.cat(parts, dim=1), expected, mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_logits_of_the_module(pair, name, tmp_path):
    reference, _ = pair(name)
    save_model(tmp_path, name)
    engine = init_inference(tmp_path, device="cpu")
    ids, mask = padded([12, 1])
    assert_near(engine(ids, mask).logits, logits_of(reference, ids, mask), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    reference = make_model("llama")
    engine = init_inference(copy.deepcopy(reference), dtype=dtype, device="cpu")
    assert engine.dtype is engine(IDS, MASK).logits.dtype is dtype
    expected = logits_of(reference, IDS, MASK)[MASK == 1]
    assert (engine(IDS, MASK).logits[MASK == 1].float() - expected).abs().mean() < 0.02 * expected.abs().max()


# --------------------------------------------------------------------------------------------- arguments of forward


def test_the_output_is_that_of_transformers(pair):
    reference, engine = pair("qwen2-tied")
    output, expected = engine(IDS), reference(IDS)
    assert type(output) is type(expected)
    assert list(output.keys()) == list(expected.keys())
    assert len(engine(IDS, return_dict=False)) == len(reference(IDS, return_dict=False)) == 2
    assert len(engine(IDS, use_cache=False, return_dict=False)) == 1


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(
    "keep", [1, 3, 100, torch.tensor([2]), torch.tensor([7, 0, 7]), torch.tensor([-1, 4]), torch.arange(9).flip(0)]
)
def test_only_the_wanted_logits_are_computed(pair, keep, mask):
    reference, engine = pair("llama")
    expected = logits_of(reference, IDS, torch.ones_like(IDS) if mask is None else mask)
    columns = torch.arange(9)[keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
    kept = engine(IDS, mask, logits_to_keep=keep).logits
    assert_near(kept, expected[:, columns], (torch.ones_like(IDS) if mask is None else mask)[:, columns])


def test_without_a_mask_every_token_counts(pair):
    reference, engine = pair("gpt2")
    torch.testing.assert_close(engine(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_have_any_type(pair, dtype):
    _, engine = pair("gpt2")
    assert torch.equal(engine(IDS, MASK.to(dtype)).logits, engine(IDS, MASK).logits)


def test_holes_in_a_mask_close(pair):
    _, engine = pair("gpt2")
    ids, _ = padded([9])
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0]])
    kept = mask[0] == 1
    torch.testing.assert_close(engine(ids, mask).logits[:, kept], engine(ids[:, kept]).logits)


def test_positions_that_follow_from_the_mask_may_be_given(pair):
    _, engine = pair("gpt2")
    given = engine(IDS, MASK, positions_of(MASK)).logits
    assert torch.equal(given, engine(IDS, MASK).logits)
    cache = engine(IDS[:, :5], MASK[:, :5]).past_key_values
    rest = engine(IDS[:, 5:], MASK, positions_of(MASK)[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(rest, given[:, 5:])


def test_a_row_may_be_all_padding(pair):
    _, engine = pair("gpt2")
    mask = MASK.clone()
    mask[0] = 0
    assert not engine(IDS, mask).logits[0].any()
    assert not engine(IDS, torch.zeros_like(MASK)).logits.any()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": MASK * 2}, "other values than 0 and 1"),
        ({"attention_mask": MASK - 0.5}, "other values than 0 and 1"),
        ({"attention_mask": MASK[:, :5]}, r"shape \[2, 5\]; give \[2, 9\]"),
        ({"attention_mask": MASK[:, None, None]}, r"shape \[2, 1, 1, 9\]; give \[2, 9\]"),
        ({"attention_mask": MASK, "position_ids": torch.arange(9)[None]}, "position_ids are not those that follow"),
        ({"position_ids": torch.arange(8)[None]}, "position_ids"),
        ({"past_key_values": DynamicCache()}, r"DynamicCache; .*new_cache"),
        ({"labels": IDS}, "labels are for training"),
        ({"inputs_embeds": torch.zeros(2, 9, 60)}, "inputs_embeds"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"atention_mask": MASK}, "atention_mask is not an argument"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pair, arguments, says):
    with pytest.raises(InvalidRequestError, match=says):
        pair("qwen2-tied")[1](IDS, **arguments)


@pytest.mark.parametrize(
    "ids", [None, [[1, 2]], torch.tensor([1, 2]), torch.ones(2, 2), torch.zeros(2, 0, dtype=torch.long)]
)
def test_ids_that_are_none(pair, ids):
    with pytest.raises(InvalidRequestError, match=r"input_ids.*give"):
        pair("qwen2-tied")[1](ids)


@pytest.mark.parametrize("token", [-1, 100_000])
def test_ids_beyond_the_vocabulary(pair, token):
    with pytest.raises(InvalidRequestError, match=rf"input_ids holds {token}, but the model has ids 0 to"):
        pair("qwen2-tied")[1](torch.tensor([[5, token]]))


def test_off_switches_are_no_arguments(pair):
    pair("qwen2-tied")[1](IDS, output_attentions=False, output_hidden_states=None, labels=None)


def test_a_text_that_is_too_long(pair):
    with pytest.raises(ContextLengthError, match=r"513 tokens, but the engine holds 512"):
        pair("gpt2")[1](torch.ones(1, 513, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- the cache


def test_a_cache_may_be_made_first(pair):
    _, engine = pair("gpt2")
    cache = engine.new_cache()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    assert engine(IDS, past_key_values=cache, use_cache=False).past_key_values is cache
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (9, 2, True)


def test_a_cache_of_other_rows_is_refused(pair):
    _, engine = pair("gpt2")
    cache = engine(IDS).past_key_values
    with pytest.raises(InvalidRequestError, match="3 rows, but the cache has 2"):
        engine(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)


def test_a_mask_that_changes_its_mind_is_refused(pair):
    _, engine = pair("gpt2")
    cache = engine(IDS, MASK).past_key_values
    with pytest.raises(InvalidRequestError, match="differs from the one by which"):
        engine(IDS[:, :1], torch.ones(2, 10), past_key_values=cache)


def test_a_copied_cache_is_another(pair):
    reference, engine = pair("gpt2")
    prompt = engine(IDS[:, :6]).past_key_values
    copied = copy.deepcopy(prompt)
    engine(IDS.flip(0)[:, 6:], past_key_values=prompt)
    again = engine(IDS[:, 6:], past_key_values=copied).logits
    torch.testing.assert_close(again, reference(IDS).logits[:, 6:], rtol=0, atol=1e-4)


def test_a_cache_outlives_the_mode_in_which_it_was_made(pair):
    reference, engine = pair("gpt2")
    with torch.inference_mode():
        cache = engine(IDS[:, :6]).past_key_values
    rest = engine(IDS[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, reference(IDS).logits[:, 6:], rtol=0, atol=1e-4)
