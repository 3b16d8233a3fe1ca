"""The floors: what the cost model counts is what the models are made of, and what was counted by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headrace.benchmarks.costs import Ceilings, Cost, Costs, num_parameters
from headrace.benchmarks.decode import DECODE
from headrace.benchmarks.latency import LATENCY
from headrace.benchmarks.measure import Case
from headrace.benchmarks.models import config_of, spec_of
from headrace.benchmarks.prefill import PREFILL
from headrace.benchmarks.shapes import SHAPES, Source
from headrace.kernels.model import Model
from headrace.kernels.policies import find_policy
from headrace.kernels.quantize import SCHEMES
from tests.support.tiny_models import FAMILIES, make_model

H200 = Ceilings(read=4.38e12, matmul=792e12)


def source(name):
    return Source(name=name, shape=name, dtype=SHAPES[name].dtype)


def costs(name, **more):
    return Costs(spec_of(source(name)), 2, **more)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name):
    spec = spec_of(source(name))
    model = Model(spec, dtype=torch.float32, device="meta")

    assert num_parameters(spec) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family(family):
    """Families differ in norms, biases, experts: none is forgotten."""
    module = make_model(family)
    config = module.config
    config.architectures = [type(module).__name__]
    spec = find_policy(type(module).__name__).spec(config)
    model = Model(spec, dtype=torch.float32, device="meta")

    assert num_parameters(spec) == sum(parameter.numel() for parameter in model.parameters())


# Milliseconds per token at batch 1 behind a prompt of 128, counted by hand: weights and head, at 4.38 TB/s.
@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("llama-8b", 3.43),
        ("llama-1b", 0.57),
        ("gpt2-xl", 0.71),
        ("opt-6.7b", 3.04),
        ("gptj-6b", 2.67),
        ("pythia-6.9b", 3.04),
        ("bloom-7b1", 3.23),
        ("falcon-7b", 3.1),
        ("t5-3b", 0.66),
    ],
)
def test_floors_of_one_token(name, floor):
    case = Case(measure="decode", source=source(name), batch=1, prompt_tokens=128, output_tokens=16)
    [cost] = DECODE.cost(costs(name), case)

    assert cost.seconds(H200) * 1e3 == pytest.approx(floor, rel=0.03)


def test_floor_of_an_encoder():
    """24 layers of 12,596,224 parameters; of the 31.8 million of the embeddings only rows are read."""
    assert costs("bert-large").texts(1, 128).bytes == 24 * 12_596_224 * 2


@pytest.mark.parametrize(("batch", "floor"), [(16, 3.95), (64, 5.5)])
def test_floors_of_batches(batch, floor):
    assert costs("llama-8b").step(batch, 1088).seconds(H200) * 1e3 == pytest.approx(floor, rel=0.01)


def test_a_step_counts_weights_once_and_contexts_each():
    model = costs("llama-8b")
    per_token = 32 * 2 * 8 * 128 * 2

    assert model.step(1, 0).bytes == model.step(64, 0).bytes == (8_030_261_248 - 128_256 * 4096) * 2
    assert model.step(64, 1000).bytes - model.step(64, 0).bytes == 64 * 1000 * per_token
    assert model.step(64, 0).flops == 64 * model.step(1, 0).flops


def test_a_large_batch_is_bound_by_its_operations():
    step = costs("llama-8b").step(4096, 1)

    assert step.seconds(H200) == step.flops / H200.matmul > step.bytes / H200.read


def test_prompts_count_half_of_the_square():
    """By hand: twice the weights per token, and of attention 4 * width per pair of tokens, half of the square; in the
    last layer only keys and values of all, and one token that sees them."""
    layer = 4096 * (6144 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    flops = 31 * (2 * layer * 8192 + 4 * 4096 * 8192 * 8192 / 2)
    flops += 2 * (layer + 8191 * 4096 * 2048) + 4 * 4096 * 8192 + 2 * (4096 * 128_256 + 4096)

    assert costs("llama-8b").prompts(1, 8192).flops == pytest.approx(flops, rel=1e-9)


def test_of_texts_all_tokens_are_wanted():
    layer = 4 * 1024 * 1024 + 2 * 1024 * 4096 + 9 * 1024 + 4096 + 4 * 1024
    flops = 24 * (2 * layer * 256 + 4 * 1024 * 2 * 128 * 128)

    assert costs("bert-large").texts(2, 128).flops == pytest.approx(flops, rel=1e-3)


def test_a_window_bounds_what_is_seen():
    config = config_of(source("llama-8b"))
    spec = find_policy("MistralForCausalLM").spec(_mistral(config))
    windowed = Costs(spec, 2)

    assert windowed.context(100_000).bytes == windowed.context(4096).bytes > windowed.context(4095).bytes


def _mistral(config):
    from transformers import MistralConfig

    return MistralConfig(
        hidden_size=config.hidden_size, num_hidden_layers=2, sliding_window=4096, architectures=["MistralForCausalLM"]
    )


def _mixtral():
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    config.architectures = ["MixtralForCausalLM"]
    return config


def test_experts_are_read_as_far_as_they_are_asked():
    model = Costs(find_policy("MixtralForCausalLM").spec(_mixtral()), 2)
    expert = 3 * 64 * 128 * 2
    rest = model.step(1, 0).bytes - 2 * expert

    assert model.step(2, 0).bytes == pytest.approx(rest + 8 * (1 - 0.75**2) * expert, abs=2)
    assert model.step(1000, 0).bytes == pytest.approx(rest + 8 * expert, abs=2)


def test_an_encoder_decoder_reads_its_source():
    """One layer's keys and values of 128 tokens of source and 10 of its own, 24 layers, 32 heads of 128."""
    model = costs("t5-3b")

    assert model.step(1, 10, 128).bytes - model.step(1, 0, 0).bytes == 24 * 2 * 32 * 128 * 138 * 2


def test_quantized_projections_are_a_byte_each_and_have_factors():
    """The tiny Llama by hand: hidden 64, 4 heads and 2 of keys of 16, 96 inside, 2 layers, a head of 300."""
    projections = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 64 * 2 * 96 + 96 * 64)
    rows = 2 * ((64 + 2 * 32) + 64 + 2 * 96 + 64)
    others = 2 * 2 * 64 + 64 + 300 * 64  # norms, and the head
    plain, quantized = costs("tiny"), costs("tiny", quantized=True)

    assert (projections, rows, others) == (61_440, 896, 19_520)
    assert plain.step(1, 0).bytes == 2 * (61_440 + 19_520)
    assert quantized.step(1, 0).bytes == quantized.step(9, 0).bytes == 61_440 + 2 * (896 + 19_520)
    assert quantized.prompts(3, 7).bytes == quantized.step(1, 0).bytes
    # 7 tokens, keys and values of 2 heads of 16 in 2 layers, still 16-bit.
    assert quantized.step(3, 7).bytes - quantized.step(3, 0).bytes == 3 * 7 * 2 * 2 * 2 * 16 * 2
    assert quantized.step(3, 7).flops == plain.step(3, 7).flops
    assert quantized.prompts(3, 7).flops == plain.prompts(3, 7).flops


def test_biases_and_norms_are_not_quantized():
    """The tiny BERT by hand: hidden 32, 64 inside, 2 layers, biases everywhere, two norms of two rows each."""
    projections = 2 * (32 * 96 + 32 * 32 + 32 * 64 + 64 * 32)
    rows = 2 * (96 + 32 + 64 + 32)
    norms = 2 * 2 * 2 * 32

    assert costs("tiny-bert").texts(1, 8).bytes == 2 * (projections + rows + norms)  # as many biases as rows
    assert costs("tiny-bert", quantized=True).texts(1, 8).bytes == projections + 2 * (rows + rows + norms)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_quantized_is_that_of_the_model(name):
    """A step of a decoder reads all but the projections that made what it sees of a source, and rows of embeddings."""
    spec = spec_of(source(name))
    model = Model(spec, dtype=torch.bfloat16, device="meta", scheme=SCHEMES["int8"])
    read = [part for name, part in model.projections().items() if not name.startswith("encoder.")]
    made = [part for name, part in model.projections().items() if name.endswith(".key_value")]
    saved = sum(part.weight.numel() - 2 * len(part.weight) for part in read)
    saved -= sum(part.weight.numel() - 2 * len(part.weight) for part in made)
    plain, quantized = (Costs(spec, 2, quantized=narrow).step(1, 0).bytes for narrow in (False, True))

    assert plain - quantized == saved


def test_the_floor_of_one_token_of_a_quantized_model():
    """6.98 billion bytes of projections and 1.05 of a head, at 4.38 TB/s."""
    case = Case(measure="decode", source=source("llama-8b"), batch=1, prompt_tokens=128, output_tokens=16)
    [cost] = DECODE.cost(costs("llama-8b", quantized=True), case)

    assert cost.seconds(H200) * 1e3 == pytest.approx(1.84, abs=0.005)


def test_experts_are_quantized_and_read_as_far_as_they_are_asked():
    spec = find_policy("MixtralForCausalLM").spec(_mixtral())
    attention = 64 * 64 * 4 - 2 * 64 * 4  # a byte each is saved, but for factors
    expert = 3 * 64 * 128 - 2 * (2 * 128 + 64)
    saved = Costs(spec, 2).step(5, 0).bytes - Costs(spec, 2, quantized=True).step(5, 0).bytes

    assert saved == pytest.approx(attention + 8 * (1 - 0.75**5) * expert, rel=1e-9)


def test_projections_may_be_of_fp8():
    """Half the time of all operations but those of attention, and of the head for one token."""
    case = Case(measure="prefill", source=source("llama-8b"), batch=1, prompt_tokens=8192, output_tokens=1)
    [cost] = PREFILL.cost(costs("llama-8b", quantized=True), case)
    attention, head = 31 * 4 * 32 * 128 * 8192**2 / 2, 2 * 128256 * 4096  # and one token's in the last layer
    faster = dataclasses.replace(H200, fp8=2 * H200.matmul)

    assert cost.flops - cost.projected == pytest.approx(attention + head, rel=1e-3)
    saved = cost.seconds(H200) - cost.seconds(faster)
    assert saved == pytest.approx(cost.projected / H200.matmul / 2)


def test_costs_add_up():
    assert Cost(1, 2, 1) + Cost(3, 4, 2) * 2 == Cost(7, 10, 5)


def test_the_part_of_attention_in_a_step():
    """Keys and values of 2 x 100 tokens of 32 layers with 8 heads of 128 numbers; four operations with 32 heads."""
    model = costs("llama-8b")
    cost, bare = model.step(2, 100), model.step(2, 0)

    assert cost.attention.bytes == 2 * 100 * 32 * (2 * 8 * 128) * 2
    assert cost.attention.flops == 2 * 100 * 32 * (4 * 32 * 128)
    assert (cost.matmul.bytes, cost.matmul.flops) == (bare.bytes, bare.flops)
    assert cost.attention.bytes + cost.matmul.bytes == cost.bytes
    assert cost.attention.flops + cost.matmul.flops == cost.flops


def test_the_part_of_attention_in_a_prompt():
    """Half of the square in all layers but the last, where one token sees all; its keys and values are not read."""
    cost = costs("llama-8b").prompts(1, 1000)

    assert cost.attention.flops == 4 * 32 * 128 * (31 * 1000 * 1000 / 2 + 1000)
    assert cost.attention.bytes == 0
    assert cost.matmul.flops == pytest.approx(2 * 1000 * 31 * 218_112_000, rel=0.02)  # parameters of a layer


def test_the_part_of_attention_in_a_whole_answer():
    """Parts of prompt and steps add up, whatever the model."""
    for name in ("llama-8b", "t5-3b"):
        case = Case(measure="latency", source=source(name), batch=2, prompt_tokens=50, output_tokens=9)
        parts = LATENCY.cost(costs(name), case)
        whole = sum(parts, Cost())

        assert whole.attention.flops == pytest.approx(sum(part.attention.flops for part in parts))
        assert whole.attention.bytes == pytest.approx(sum(part.attention.bytes for part in parts))
        assert 0 < whole.attention.bytes < whole.bytes
        assert whole.matmul.projected == whole.projected
