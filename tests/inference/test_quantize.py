"""An engine with weights in 8 bits: what it computes, what it says of itself, and what its owner may do with it."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.quantize import SCHEMES
from headrace.workers.inference import init_inference
from headrace.workers.inference.watch import Watch
from tests.support.quantized import rounded
from tests.support.tiny_encoders import make_any
from tests.support.tiny_models import make_model, save_model

IDS = torch.tensor([[5, 60, 7, 200, 9], [8, 100, 42, 7, 1]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def engine_of(module, scheme="int8", **settings):
    return init_inference(module, device="cpu", quantize=scheme, **settings)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-7b", "gemma3", "mixtral"])
def test_texts_are_those_of_the_rounded_model(scheme, name):
    expected = rounded(make_model(name), scheme).generate(IDS, **GREEDY)
    engine = engine_of(make_model(name), scheme)
    assert torch.equal(engine.generate(IDS, **GREEDY), expected)
    many = engine.generate_many([row.tolist() for row in IDS], max_tokens=12, temperature=0.0, ignore_eos=True)
    assert len(many) == 2
    assert all(len(tokens) == 12 for tokens in many)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("name", ["t5-v1.1", "bert", "bert-SequenceClassification", "roberta-pooled"])
def test_what_reads_whole_texts(scheme, name):
    ids = IDS % 90 + 5  # none of which stands for padding
    arguments = {"decoder_input_ids": ids[:, :3]} if name == "t5-v1.1" else {}
    expected = rounded(make_any(name), scheme)(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)[0]
    found = engine_of(make_any(name), scheme)(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", ["qwen2-tied", "mixtral"])
def test_folders_and_modules_are_the_same(tmp_path, name):
    module = save_model(tmp_path, name)
    first, other = engine_of(tmp_path), engine_of(module)
    torch.testing.assert_close(first(IDS).logits, other(IDS).logits, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- its report


@pytest.mark.parametrize(
    ("scheme", "dtype", "how"),
    [
        ("int8", "bfloat16", "linear (int8, multiplied as it is for few rows, above dequantized for oneDNN)"),
        ("int8", "float32", "linear (int8, dequantized for each product)"),
        ("fp8", "bfloat16", "linear (fp8, dequantized for each product; many rows are rounded to fp8, too)"),
    ],
)
def test_the_report(scheme, dtype, how):
    engine = engine_of(make_model("llama"), scheme, dtype=dtype)
    report = engine.report()
    size = getattr(torch, dtype).itemsize
    scales = sum(scale.numel() for scale in engine.module.scales().values())
    layers = sum(part.weight.numel() for part in engine.module.projections().values())
    rest = sum(weight.numel() for weight in engine.parameters()) - layers
    factor = (SCHEMES[scheme].factors or getattr(torch, dtype)).itemsize
    assert report.weight_bytes == layers + scales * factor + rest * size
    assert (report.quantized, report.dtype) == (scheme, dtype)
    assert report.slots["out"] == how
    assert scheme not in report.slots["head"]
    assert set(report.left_alone) == {"embedding", "head", "norms and biases"}
    text = str(report)
    assert f"{scheme} weights, {dtype} activations and cache on cpu" in text
    assert "head: not quantized, for what it errs by is seen in the logits at once" in text
    stored = str(SCHEMES[scheme].dtype).removeprefix("torch.")
    assert f"(qkv): Linear(72, 120, bias=False, {stored})" in repr(engine)
    assert stored not in repr(engine.module.head)


def test_the_report_of_experts():
    report = engine_of(make_model("mixtral")).report()
    assert report.slots["mlp"] == "experts (int8), silu, gate stacked on up, 2 of 5 experts a token"
    assert "norms, biases and routers" in report.left_alone


def test_the_report_of_a_plain_model_says_nothing_of_it():
    report = init_inference(make_model("llama"), device="cpu").report()
    assert report.quantized == ""
    assert "float32 on cpu" in str(report)
    assert set(report.left_alone) == {"embedding"}


# --------------------------------------------------------------------------------------------- what its owner may do


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_weights_that_others_hold_as_they_were_are_quantized_when_they_are_loaded(scheme, monkeypatch):
    """A plain copy into 8 bits would have left zeros and ones, and then an error about missing factors."""
    monkeypatch.setattr("headrace.kernels.weight.pack_weight", lambda weight: weight)  # a packed one cannot be copied
    engine, other = engine_of(make_model("llama"), scheme), engine_of(make_model("llama", seed=8), scheme)
    plain = init_inference(make_model("llama", seed=8), device="cpu")
    expected = other(IDS).logits
    engine.module.load_state_dict(plain.module.state_dict())
    assert torch.equal(engine(IDS).logits, expected)
    again = engine_of(make_model("llama"), scheme)
    again.module.load_state_dict(other.module.state_dict())
    assert torch.equal(again(IDS).logits, expected)


def test_factors_are_watched_and_kept_as_weights_are():
    """Graphs read them where they were."""
    model = engine_of(make_model("llama")).module
    watch = Watch(model)
    part = model.blocks[0].qkv
    assert part.scale.data_ptr() in {kept.data_ptr() for kept in watch._kept if not kept.is_mkldnn}
    with torch.no_grad():
        part.scale.mul_(2)
    watch.look()
    assert (watch.changes, watch.moves) == (1, 0)
    part.scale = part.scale.clone()
    watch.look()
    assert watch.moves == 1
