"""The families we know, and how to find the one of a checkpoint."""

from __future__ import annotations

import difflib

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies.base import Policy
from headrace.kernels.policies.bert import BERT, ROBERTA
from headrace.kernels.policies.bloom import BLOOM
from headrace.kernels.policies.falcon import FALCON
from headrace.kernels.policies.gemma import GEMMA2, GEMMA3
from headrace.kernels.policies.gpt import GPT2, GPT_NEOX, GPTJ
from headrace.kernels.policies.llama import LLAMA, MISTRAL, MIXTRAL, PHI3, QWEN2, QWEN3
from headrace.kernels.policies.opt import OPT
from headrace.kernels.policies.t5 import T5, T5_ENCODER

__all__ = ["POLICIES", "find_policy"]

POLICIES = (
    BERT,
    BLOOM,
    FALCON,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPTJ,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OPT,
    PHI3,
    QWEN2,
    QWEN3,
    ROBERTA,
    T5,
    T5_ENCODER,
)


def find_policy(architecture: str) -> Policy:
    """The policy of a Hugging Face class name.

    Raises:
        UnsupportedModelError: there is none; names the nearest.
    """
    by_name = {name: policy for policy in POLICIES for name in policy.classes}
    if architecture in by_name:
        return by_name[architecture]
    near = difflib.get_close_matches(architecture, by_name, n=1, cutoff=0.0)[0]
    supported = ", ".join(sorted(by_name))
    raise UnsupportedModelError(
        f"The architecture {architecture!r} is not supported; the nearest supported one is {near}. "
        f"Supported: {supported}.",
        param="model",
    )
