"""The refusal that docs/startup.md shows is the one that is printed."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig

from headrace.card import ModelCard
from headrace.errors import ModelError
from headrace.kernels.policies import find_policy
from headrace.workers import kv_size
from headrace.workers.config import EngineConfig
from headrace.workers.memory import GpuMemory
from tests.scripts.commands import ROOT

PAGE = (ROOT / "docs/startup.md").read_text()

# Llama-3.1-70B, as its config says.
LLAMA_70B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


def test_the_refusal_is_the_one_that_is_printed(monkeypatch):
    """On an H100, which has 79.1 GiB and computes with fp8."""
    memory = GpuMemory(total=int(79.1 * (1 << 30)), held=0, utilization=EngineConfig().gpu_memory_utilization)
    monkeypatch.setattr(kv_size, "gpu_memory", lambda device, utilization: memory)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec = find_policy("LlamaForCausalLM").spec(LLAMA_70B)
    card = ModelCard(
        name="Llama-3.1-70B",
        architecture="LlamaForCausalLM",
        family="llama",
        fingerprint="",
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_positions,
        dtype="bfloat16",
    )
    with pytest.raises(ModelError) as refused:
        kv_size.check_before_loading(spec, card, EngineConfig(), torch.bfloat16, torch.device("cuda", 0))

    (shown,) = re.findall(r"```\n(Llama-3\.1-70B does not fit.*?)```", PAGE, re.DOTALL)

    assert shown.split() == refused.value.message.split(), f"docs/startup.md should show:\n{refused.value.message}"


def test_what_is_said_of_compilations_has_the_name_of_the_metric():
    named = set(re.findall(r"`(headrace_[a-z_]+)`", PAGE))

    assert named == {"headrace_compilations_total"}
    assert named <= set(re.findall(r"`(headrace_[a-z_]+)`", (ROOT / "docs/operations.md").read_text()))
