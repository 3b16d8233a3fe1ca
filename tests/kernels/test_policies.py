"""Policies: what is found, what is refused and how that is said."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies import POLICIES, find_policy
from headrace.kernels.policies.base import alibi_slopes


def test_every_family_has_its_own_name_and_architectures():
    assert len({policy.family for policy in POLICIES}) == len(POLICIES)
    names = [name for policy in POLICIES for name in policy.architectures]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("architecture", "nearest"), [("Qwen4ForCausalLM", "Qwen3ForCausalLM"), ("Llama4ForCausalLM", "LlamaForCausalLM")]
)
def test_an_unknown_architecture_is_told_the_nearest(architecture, nearest):
    with pytest.raises(UnsupportedModelError, match=f"{architecture}.*nearest supported one is {nearest}") as caught:
        find_policy(architecture)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("policy", "config", "names"),
    [
        ("LlamaForCausalLM", LlamaConfig(hidden_act="mish"), "mish"),
        (
            "LlamaForCausalLM",
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            "dynamic",
        ),
        ("Gemma2ForCausalLM", Gemma2Config(use_bidirectional_attention=True), "both directions"),
        ("GPT2LMHeadModel", GPT2Config(add_cross_attention=True), "cross attention"),
    ],
)
def test_what_a_family_can_be_but_we_do_not_compute_is_refused(policy, config, names):
    with pytest.raises(UnsupportedModelError, match=names):
        find_policy(policy).spec(config)


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 16])
def test_slopes_are_those_of_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    distances = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert alibi_slopes(heads) == pytest.approx(distances.tolist())


def test_sources_name_every_layer():
    policy = find_policy("LlamaForCausalLM")
    spec = policy.spec(LlamaConfig(num_hidden_layers=2))
    sources = dict(policy.sources(spec))
    assert sources["blocks.1.qkv.weight"].tensors == (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    )
    assert "blocks.2.qkv.weight" not in sources
    assert sources["embedding.weight"].tensors == ("model.embed_tokens.weight",)
