"""Well-known encoders and encoder-decoders at their real sizes, all layers and the whole vocabulary, on a GPU.

The weights are random, and the same in transformers; what is asked of each type is as in test_head_sizes.py.
"""

from __future__ import annotations

import gc

import pytest
import torch

from tests.support.kernels import Kernels
from tests.support.parity import (
    at_once,
    at_random,
    check,
    encoder_states,
    exactly,
    in_steps,
    narrowed,
    sourced_logits_of,
    their_answers,
    their_logits,
    their_states,
)
from tests.support.real_sizes import KNOWN, injected, make_known

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("kernels", ["cuda"], indirect=True)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENS = (1, 512, 300, 77)  # 512 is the most that BERT and RoBERTa read
DECODES = 8
SHAPE = {"block_size": 16, "num_blocks": 8 * 32}


@pytest.fixture(autouse=True)
def _free_the_gpu():
    yield
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, (architecture, _) in KNOWN.items() if "T5" not in architecture])
@torch.inference_mode()
def test_encoders(kernels: Kernels, name, dtype):
    reference = make_known(name, kernels.device)
    texts = at_random(*LENS, vocab=reference.config.vocab_size)
    theirs = narrowed(reference, dtype) if dtype is not torch.float32 else None
    model = injected(reference, dtype, kernels.device)

    states = encoder_states(model, kernels, texts)
    ask = their_states(texts)
    check(states, exactly(reference, ask), theirs and ask(theirs), model)
    logits = [kernels(model.logits, part.to(dtype)).float() for part in states]
    ask = their_logits(texts)
    check(logits, exactly(reference, ask), theirs and ask(theirs), model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, (architecture, _) in KNOWN.items() if "T5" in architecture])
@torch.inference_mode()
def test_encoder_decoders(kernels: Kernels, name, dtype):
    reference = make_known(name, kernels.device)
    vocab = reference.config.vocab_size
    sources, texts = at_random(*reversed(LENS), vocab=vocab, seed=3), at_random(*LENS, vocab=vocab)
    ask = their_answers(sources, texts)
    exact = exactly(reference, ask)
    theirs = None if dtype is torch.float32 else ask(narrowed(reference, dtype))
    model = injected(reference, dtype, kernels.device)
    for steps in (at_once(LENS), in_steps(LENS, DECODES)):
        check(sourced_logits_of(model, kernels, sources, texts, steps, **SHAPE), exact, theirs, model)
