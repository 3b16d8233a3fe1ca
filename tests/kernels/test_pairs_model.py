"""Whole models on the kernels against the same models on the references: what the pairs are worth together.

That the references agree with transformers is tested in test_parity.py and its neighbours.
"""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.model import Model
from headrace.kernels.ops import linear
from headrace.workers.loader import load_model
from tests.support.batches import make_batch
from tests.support.kernels import Kernels, cases
from tests.support.parity import MARGIN, at_random, logits_of, root_mean_square
from tests.support.tiny_models import FAMILIES, save_model, save_t5

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Between them they have every setting of every kernel: norms of heads and grouped heads; unit offsets, windows, caps,
# and norms behind; rounded ALiBi and layer norms; neighbours as pairs, parts of heads, blocks side by side.
FEW = ["qwen3", "gemma2", "falcon-rw", "gptj"]

# Tokens of a step, and tokens with them, by sequence: prompts at once; then the same in three steps, decodes first.
AT_ONCE = [{0: (1, 1), 1: (30, 30), 2: (13, 13)}]
IN_STEPS = [{0: (1, 1), 1: (20, 20), 2: (5, 5)}, {1: (9, 29), 2: (7, 12)}, {1: (1, 30), 2: (1, 13)}]


def on_cpu(model: Model, *args):
    return model(*args)


@cases(FEW, [name for name in FAMILIES if name not in FEW])
@torch.inference_mode()
def test_logits_are_those_of_the_references(kernels: Kernels, case, tmp_path, monkeypatch):
    save_model(tmp_path, case)
    prompts = at_random(1, 30, 13, vocab=250)
    expected = logits_of(load_model(tmp_path, dtype="float32"), on_cpu, prompts, AT_ONCE)
    monkeypatch.setattr(linear, "_can_pack", lambda _dtype: False)  # packed weights are not for kernels
    model = load_model(tmp_path, dtype="float32", device=kernels.device)
    for steps in (AT_ONCE, IN_STEPS):
        for found, wanted in zip(logits_of(model, kernels, prompts, steps), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.inference_mode()
def test_narrow_logits_are_as_near_to_float32_as_those_of_the_references(kernels: Kernels, family, dtype, tmp_path):
    save_model(tmp_path, family)
    prompts = at_random(1, 30, 13, vocab=250)
    exact = torch.cat(logits_of(load_model(tmp_path, dtype="float32"), on_cpu, prompts, AT_ONCE))
    theirs = torch.cat(logits_of(load_model(tmp_path, dtype=dtype), on_cpu, prompts, AT_ONCE)) - exact
    model = load_model(tmp_path, dtype=dtype, device=kernels.device)
    ours = torch.cat(logits_of(model, kernels, prompts, IN_STEPS)) - exact
    assert root_mean_square(ours, model) < MARGIN * root_mean_square(theirs, model)


@cases(["t5-v1.1"], ["t5", "t5-deep-encoder"])
@torch.inference_mode()
def test_encoders_agree(kernels: Kernels, case, tmp_path):
    """The decoders of these models are tested with their engine."""
    save_t5(tmp_path, case)
    lens = (5, 1, 31)
    tokens = [token for text in at_random(*lens, vocab=250) for token in text]
    batch = make_batch([(length, length) for length in lens], token_ids=tokens, block_size=8)
    states = []
    for run, device in ((on_cpu, "cpu"), (kernels, kernels.device)):
        model = load_model(tmp_path, dtype="float32", device=device)
        assert model.encoder is not None
        states.append(run(lambda b, model=model: model.encoder(model.embedding(b.token_ids), b), batch))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)
