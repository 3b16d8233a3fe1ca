"""Every family with its layers in 8 bits, against plain models of the numbers for which those stand.

That says whether they are computed right. How far they are from the model before it was quantized is stated here, too,
for random weights, of which no model is; docs/operations.md has the numbers of a real one.
"""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.model import Model
from headrace.kernels.quantize import NARROW, SCHEMES
from headrace.workers.loader import load_model
from tests.support.parity import at_once, at_random, encoder_states, in_steps, logits_of, sourced_logits_of
from tests.support.quantized import meant_by, unpacked
from tests.support.tiny_encoders import ENCODERS, save_encoder
from tests.support.tiny_models import FAMILIES, T5_VARIANTS, save_model, save_t5

VOCAB = 100  # of the texts; the models know some more tokens
LENS = (1, 40, 17, 12)
# The most that may be lost of what is said, as a share of its root mean square. T5 loses more, whose attention is not
# scaled: with random weights every query sees one key, and a small error makes that another one.
LOST = {"int8": 0.045, "fp8": 0.2}
LOST_OF_T5 = {"int8": 0.2, "fp8": 0.6}
LOST_OF_EXPERTS = {"int8": 0.045, "fp8": 0.3}  # tokens between two experts are answered by the other one


@pytest.fixture(scope="module", params=[*FAMILIES, *T5_VARIANTS, *ENCODERS])
def folder(request, tmp_path_factory):
    """The folder of a model of every family."""
    place = tmp_path_factory.mktemp(request.param)
    save = save_t5 if request.param in T5_VARIANTS else save_encoder if request.param in ENCODERS else save_model
    save(place, request.param)
    return place


def on_cpu(call, *args):
    return call(*args)


def said(model: Model) -> torch.Tensor:
    """What a model says to texts, chunked and side by side: logits, or hidden states, [tokens, values]."""
    texts = at_random(*LENS, vocab=VOCAB)
    if model.spec.is_encoder:
        return torch.cat(encoder_states(model, on_cpu, at_random(5, 1, 31, 12, vocab=VOCAB)))
    if model.spec.encoder is not None:
        sources = at_random(30, 1, 9, 20, vocab=VOCAB, seed=3)
        return torch.cat(sourced_logits_of(model, on_cpu, sources, texts, at_once(LENS)))
    return torch.cat(logits_of(model, on_cpu, texts, in_steps(LENS, decodes=4)))


def lost(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The error's share of what there is."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", list(SCHEMES))
@torch.inference_mode()
def test_a_model_is_the_one_that_its_8_bits_stand_for(folder, name):
    quantized = unpacked(folder, dtype="float32", scheme=SCHEMES[name])
    oracle = meant_by(quantized)
    for model in (quantized, oracle):
        model.pack()
    found, meant, plain = said(quantized), said(oracle), said(load_model(folder, dtype="float32"))
    torch.testing.assert_close(found, meant, rtol=0, atol=1e-4 * float(meant.abs().max()))
    most = LOST_OF_EXPERTS if quantized.spec.layers[0].mlp.experts else LOST_OF_T5 if quantized.spec.encoder else LOST
    assert 0 < lost(found, plain) < most[name]


@pytest.mark.parametrize("name", list(SCHEMES))
@torch.inference_mode()
def test_in_float16_a_model_is_as_near_to_its_oracle_as_a_plain_one(folder, name):
    quantized = unpacked(folder, dtype="float16", scheme=SCHEMES[name])
    exact, narrow = meant_by(quantized).float(), meant_by(quantized)
    for model in (quantized, narrow, exact):
        model.pack()
    wanted = said(exact)
    assert lost(said(quantized), wanted) < 1.3 * lost(said(narrow), wanted) + 1e-4


@torch.inference_mode()
def test_bfloat16_and_int8_are_multiplied_as_they_are(tmp_path):
    """On a CPU few rows are, by a product of PyTorch's that wants whole vectors."""
    save_model(tmp_path, "llama", hidden_size=96, intermediate_size=128, num_attention_heads=6)
    quantized = unpacked(tmp_path, dtype="bfloat16", scheme=SCHEMES["int8"])
    exact, narrow = meant_by(quantized).float(), meant_by(quantized)
    for model in (quantized, narrow, exact):
        model.pack()
    wanted = said(exact)
    assert lost(said(quantized), wanted) < 1.3 * lost(said(narrow), wanted)


@torch.inference_mode()
def test_many_rows_of_fp8_are_rounded_too(tmp_path):
    """Tensor cores multiply their like; so a long prompt loses what its rows lose, beside what its weights do."""
    save_model(tmp_path, "llama", hidden_size=96, intermediate_size=128)
    quantized = unpacked(tmp_path, dtype="float32", scheme=SCHEMES["fp8"])
    exact = meant_by(quantized)
    for model in (quantized, exact):
        model.pack()
    for lens, least, most in (((30, 34), 0, 1e-5), ((40, 40), 0.01, LOST["fp8"])):
        texts = at_random(*lens, vocab=VOCAB)
        found, wanted = (torch.cat(logits_of(model, on_cpu, texts, at_once(lens))) for model in (quantized, exact))
        assert least <= lost(found, wanted) < most


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_all_products_of_layers_are_quantized(tmp_path, kind):
    if kind == "decoder":
        save_model(tmp_path, "qwen2-tied")
    else:
        save_t5(tmp_path)
    model = load_model(tmp_path, dtype="float32", scheme=SCHEMES["int8"])
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype in NARROW}
    assert narrow == set(model.scales())
    ends = {name.partition("blocks.")[2].partition(".")[2] for name in narrow}
    crossing = {"cross.query.weight", "cross.key_value.weight", "cross.out.weight"}
    plain = {"qkv.weight", "out.weight", "mlp.up.weight", "mlp.down.weight"}
    assert ends == (plain if kind == "decoder" else plain | crossing)
    assert kind == "decoder" or any(name.startswith("encoder.blocks") for name in narrow)
    assert model.embedding.weight.dtype is torch.float32
