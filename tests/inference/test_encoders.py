"""`engine(...)` of encoders is what transformers gives for each text by itself; what they cannot do is said."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.errors import ConfigError, ContextLengthError, InvalidRequestError, UnsupportedModelError
from headrace.workers.inference import init_inference
from tests.inference.batches import padded
from tests.support.tiny_encoders import ENCODERS, make_encoder
from tests.support.tiny_models import make_t5

LENS = [11, 3, 1, 38]
PAD = 1  # the position of padding is the one of this id in RoBERTa, which no text here has


def batch(side="right", lens=LENS, spare=0):
    ids, mask = padded(lens, side=side, spare=spare, vocab=99)
    return (ids + 2).masked_fill(mask == 0, PAD), mask


IDS, MASK = batch()


def expected_of(reference, ids, mask, **arguments):
    """What transformers makes of each text by itself: by name, a list of one result per row."""
    rows = [
        reference(
            ids[row : row + 1, mask[row] == 1],
            **{name: more[row : row + 1, mask[row] == 1] for name, more in arguments.items()},
        )
        for row in range(len(ids))
    ]
    return {name: [row[name][0] for row in rows] for name in rows[0]}


def assert_each(output, expected, mask):
    """Every text has what transformers gives for it, and padding has zeros."""
    assert list(output.keys()) == list(expected)
    for name, rows in expected.items():
        for row, wanted in enumerate(rows):
            got = output[name][row]
            if wanted.ndim == 2:
                assert not got[mask[row] == 0].any()
                got = got[mask[row] == 1]
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_padded_batch_is_what_transformers_makes_of_each_text(pair, name, side):
    reference, engine = pair(name)
    ids, mask = batch(side)
    assert_each(engine(ids, mask), expected_of(reference, ids, mask), mask)
    assert_each(engine(ids, attention_mask=mask.bool()), expected_of(reference, ids, mask), mask)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_right_padding_is_read_as_transformers_reads_it(pair, name):
    reference, engine = pair(name)
    expected, got = reference(IDS, attention_mask=MASK), engine(IDS, MASK)
    assert type(got) is type(expected)
    for one, other in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        kept = MASK == 1 if one.ndim == 3 else slice(None)
        torch.testing.assert_close(one[kept], other[kept], rtol=0, atol=1e-4 * float(other.abs().max()))
    assert len(engine(IDS, MASK, return_dict=False)) == len(got)


@pytest.mark.parametrize("name", ["bert-pooled", "roberta"])
@torch.no_grad()
def test_without_a_mask_every_token_counts(pair, name):
    reference, engine = pair(name)
    ids = IDS[:2, :3]
    got, expected = engine(input_ids=ids), reference(ids)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_segments_are_told_apart(pair, side):
    reference, engine = pair("bert-pooled")
    ids, mask = batch(side)
    types = torch.arange(38) % 3
    types = types.expand(ids.shape).contiguous()
    got = engine(ids, mask, token_type_ids=types)
    assert_each(got, expected_of(reference, ids, mask, token_type_ids=types), mask)
    assert torch.equal(engine(ids, mask, types[:1]).last_hidden_state, got.last_hidden_state)
    assert not torch.equal(engine(ids, mask).last_hidden_state, got.last_hidden_state)


@torch.no_grad()
def test_positions_that_follow_from_the_mask_may_be_given(pair):
    for name, first in (("bert", 0), ("roberta", PAD + 1)):
        engine = pair(name)[1]
        positions = (torch.arange(38) + first)[None]
        assert torch.equal(engine(IDS, MASK, position_ids=positions).logits, engine(IDS, MASK).logits)
        with pytest.raises(InvalidRequestError, match="position_ids are not those that follow"):
            engine(IDS, MASK, position_ids=positions + 1)


@torch.no_grad()
def test_holes_in_a_mask_close(pair):
    engine = pair("bert")[1]
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0]])
    kept = mask[0] == 1
    torch.testing.assert_close(engine(IDS[:1, :8], mask).logits[:, kept], engine(IDS[:1, :8][:, kept]).logits)


def test_a_row_may_be_all_padding(pair):
    engine = pair("bert-pooled")[1]
    mask = MASK.clone()
    mask[1] = 0
    got = engine(IDS, mask)
    assert not got.last_hidden_state[1].any()
    assert not got.pooler_output[1].any()
    torch.testing.assert_close(got.pooler_output[2:], engine(IDS, MASK).pooler_output[2:])
    with pytest.raises(InvalidRequestError, match="attention_mask is all 0, so there is nothing to read"):
        engine(IDS, torch.zeros_like(MASK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_types(dtype):
    reference = make_encoder("bert-pooled")
    engine = init_inference(copy.deepcopy(reference), dtype=dtype, device="cpu")
    got = engine(IDS, MASK)
    assert got.last_hidden_state.dtype is got.pooler_output.dtype is dtype
    expected = reference(IDS, attention_mask=MASK).last_hidden_state[MASK == 1]
    assert (got.last_hidden_state[MASK == 1].float() - expected).abs().mean() < 0.02 * expected.abs().max()


@torch.no_grad()
def test_the_encoder_of_t5_alone():
    from transformers import T5EncoderModel

    whole = make_t5("t5-deep-encoder")
    reference = T5EncoderModel(copy.deepcopy(whole.config)).eval()
    missing = reference.load_state_dict(whole.state_dict(), strict=False).missing_keys
    assert not missing
    module = copy.deepcopy(reference)
    engine = init_inference(module, device="cpu")
    assert_each(engine(IDS, MASK), expected_of(reference, IDS, MASK), MASK)
    with pytest.raises(UnsupportedModelError, match="T5EncoderModel were moved into an engine"):
        module(IDS)
    with pytest.raises(InvalidRequestError, match="token_type_ids mean nothing to this model"):
        engine(IDS, token_type_ids=torch.zeros_like(IDS))


# ------------------------------------------------------------------------------------------------- where it comes from


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_folder_gives_what_the_module_gives(pair, name, tmp_path):
    reference, engine = pair(name)
    reference.save_pretrained(tmp_path)
    again = init_inference(tmp_path, device="cpu")
    assert torch.equal(again(IDS, MASK)[0], engine(IDS, MASK)[0])
    assert again.module.spec == engine.module.spec


@torch.no_grad()
def test_a_module_is_what_its_class_says(tmp_path):
    """A BertModel that was read from the files of a BertForMaskedLM keeps their config."""
    from transformers import BertModel

    whole = make_encoder("bert")
    whole.save_pretrained(tmp_path)
    reference = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert reference.config.architectures == ["BertForMaskedLM"]
    engine = init_inference(copy.deepcopy(reference), device="cpu")
    got = engine(IDS, MASK)
    assert got.pooler_output is None
    assert_each(got, expected_of(reference, IDS, MASK), MASK)
    assert engine.config.architectures == ["BertForMaskedLM"]


def test_a_folder_may_lack_the_pooler(tmp_path):
    make_encoder("bert-pooled").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "pooler" not in k}, file, {"format": "pt"})
    engine = init_inference(tmp_path, device="cpu")
    assert engine(IDS, MASK).pooler_output is None
    assert "pooler" not in engine.report().slots


@torch.no_grad()
def test_the_oldest_names_of_norms(pair, tmp_path):
    reference, engine = pair("bert")
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for new, old in renamed.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    assert any("gamma" in key for key in tensors)
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(init_inference(tmp_path, device="cpu")(IDS, MASK).logits, engine(IDS, MASK).logits)


def test_the_weights_are_moved():
    module = make_encoder("roberta")
    engine = init_inference(module, device="cpu")
    assert all(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(UnsupportedModelError, match="RobertaForMaskedLM were moved into an engine"):
        module(IDS)
    assert engine.report().left_alone.keys() == {"embedding"}


def test_a_bert_that_was_made_a_decoder_is_left_as_it_was():
    module = make_encoder("bert", is_decoder=True)
    with pytest.raises(UnsupportedModelError, match="a BERT that was made a decoder"):
        init_inference(module, device="cpu")
    module(IDS)


# ---------------------------------------------------------------------------------------------- what cannot be honoured


def test_encoders_write_nothing(pair):
    engine = pair("bert")[1]
    assert engine.can_generate() is False
    says = r"BertForMaskedLM is an encoder.*engine\(input_ids, attention_mask\).*such as a LlamaForCausalLM"
    for attempt in (
        lambda: engine.generate(IDS, max_new_tokens=3),
        lambda: engine.stream("hello"),
        lambda: engine.stream([5, 6]),
        lambda: engine.generate_many([[5, 6]]),
        engine.new_cache,
        lambda: engine.generation_config,
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            attempt()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": MASK * 2}, "other values than 0 and 1"),
        ({"attention_mask": MASK[:, :5]}, r"shape \[4, 5\]; give \[4, 38\]"),
        ({"attention_mask": MASK.tolist()}, "attention_mask is list; give a tensor"),
        ({"token_type_ids": torch.full_like(IDS, 3)}, "token_type_ids holds 3, but the model has segments 0 to 2"),
        ({"token_type_ids": -torch.ones_like(IDS)}, "token_type_ids holds -1"),
        ({"token_type_ids": torch.zeros(4, 5, dtype=torch.long)}, r"shape \[4, 5\]; give that of input_ids"),
        ({"token_type_ids": torch.zeros(4, 38)}, "token_type_ids is no tensor of whole numbers"),
        ({"position_ids": torch.zeros(3, 38, dtype=torch.long)}, "position_ids are not"),
        ({"inputs_embeds": torch.zeros(4, 38, 72)}, "inputs_embeds cannot be given"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"encoder_hidden_states": torch.zeros(4, 38, 72)}, "encoder_hidden_states are for a model that was made"),
        ({"labels": IDS}, "labels are for training"),
        ({"past_key_values": object()}, "past_key_values is not an argument"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pair, arguments, says):
    with pytest.raises(InvalidRequestError, match=says):
        pair("bert-pooled")[1](IDS, **arguments)


def test_ids_that_are_none(pair):
    engine = pair("bert-pooled")[1]
    with pytest.raises(InvalidRequestError, match="input_ids holds 101, but the model has ids 0 to 100"):
        engine(torch.tensor([[5, 101]]))
    with pytest.raises(InvalidRequestError, match="input_ids is NoneType; give"):
        engine()


def test_a_text_longer_than_the_positions(pair):
    ids, mask = batch(lens=[41])
    for name, most in (("bert", 40), ("roberta", 38)):
        with pytest.raises(ContextLengthError, match=rf"41 tokens, but the engine reads {most}.*max_length={most}"):
            pair(name)[1](ids, mask)
    ids, mask = batch(lens=[30], spare=20)
    pair("roberta")[1](ids, mask)  # padding has no position


def test_settings_of_encoders():
    engine = init_inference(make_encoder("bert"), device="cpu", max_tokens=20, heads=6, hidden_size=72)
    with pytest.raises(ContextLengthError, match="38 tokens, but the engine reads 20"):
        engine(IDS, MASK)
    with pytest.raises(ConfigError, match="min_tokens is 41, but the model was made for 40"):
        init_inference(make_encoder("bert"), device="cpu", min_tokens=41)


def test_the_report(pair):
    engine = pair("bert")[1]
    report = engine.report()
    assert (report.architecture, report.family) == ("BertForMaskedLM", "bert")
    assert (report.layers_replaced, report.layers_total, report.encoder_layers) == (3, 3, 3)
    assert report.kv_bytes_per_token == 0
    assert set(report.slots) == {"qkv", "attention", "out", "norm", "mlp", "head"}
    assert report.slots["attention"] == "full_attention, in both directions, 6 heads of 12"
    assert ", gelu, norm, " in report.slots["head"]
    assert "cache       none, at most 40 tokens a text" in str(report)
    assert "layers      3 of 3 replaced\n" in str(report)
    assert "3 x Block(" in repr(engine)
    engine = pair("bert-pooled")[1]
    assert "tanh, of each text's first token" in engine.report().slots["pooler"]
