"""Policies: what is found, what is refused and how that is said."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, Qwen2Config

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies import POLICIES, find_policy


def test_every_family_has_its_own_name_and_architectures():
    assert len({policy.family for policy in POLICIES}) == len(POLICIES)
    names = [name for policy in POLICIES for name in policy.architectures]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("architecture", "nearest"), [("Qwen3ForCausalLM", "Qwen2ForCausalLM"), ("Llama4ForCausalLM", "LlamaForCausalLM")]
)
def test_an_unknown_architecture_is_told_the_nearest(architecture, nearest):
    with pytest.raises(UnsupportedModelError, match=f"{architecture}.*nearest supported one is {nearest}") as caught:
        find_policy(architecture)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("policy", "config", "names"),
    [
        ("LlamaForCausalLM", LlamaConfig(hidden_act="gelu"), "gelu"),
        (
            "LlamaForCausalLM",
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            "dynamic",
        ),
        ("Qwen2ForCausalLM", Qwen2Config(use_sliding_window=True, max_window_layers=2), "sliding window"),
    ],
)
def test_what_a_family_can_be_but_we_do_not_compute_is_refused(policy, config, names):
    with pytest.raises(UnsupportedModelError, match=names):
        find_policy(policy).spec(config)


def test_sources_name_every_layer():
    policy = find_policy("LlamaForCausalLM")
    spec = policy.spec(LlamaConfig(num_hidden_layers=2))
    sources = dict(policy.sources(spec))
    assert sources["blocks.1.qkv.weight"] == (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    )
    assert "blocks.2.qkv.weight" not in sources
    assert sources["embedding.weight"] == ("model.embed_tokens.weight",)
