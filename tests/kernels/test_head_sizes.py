"""Every family at the head sizes of real models, on the kernels, against transformers on the same random weights.

float32 is the truth, as transformers computes it: ours says the same, and greedily the same tokens. Of 16 bits is asked
that they lose no more than transformers loses in the same type, for whole prompts, for chunks and for single tokens.
"""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import pytest
import torch

from headrace.card import ModelCard
from headrace.workers.engine import Engine, EngineConfig
from tests.support.engines import generate
from tests.support.kernels import Kernels, cases
from tests.support.parity import (
    at_once,
    at_random,
    check,
    encoder_states,
    exactly,
    in_steps,
    logits_of,
    narrowed,
    sourced_logits_of,
    their_answers,
    their_logits,
    their_states,
)
from tests.support.real_sizes import HEAD_SIZES, injected, make_decoder, make_encoder, make_t5
from tests.support.tiny_models import FAMILIES, T5_VARIANTS
from tests.support.tiny_tokenizer import VOCAB_SIZE

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENCODERS = ["BertForMaskedLM", "RobertaForMaskedLM"]
STEPS = 32

# Tokens of the texts, and how many of each are decoded; 300 are several tiles of keys and more than any window, 77 and
# 33 end in the middle of a block. The interpreter needs seconds for what a GPU does in microseconds.
SHAPES = {"cuda": ((1, 300, 77, 33), 8), "cpu": ((1, 9, 6), 2)}
BLOCK = 16
NUM_BLOCKS = 8 * 19


@pytest.fixture(autouse=True)
def _free_the_gpu():
    """Many processes test on one GPU; none keeps what it does not need."""
    yield
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------- decoders


@cases([("gpt2", 64, torch.float16)], product(FAMILIES, HEAD_SIZES, DTYPES))
@torch.inference_mode()
def test_logits(kernels: Kernels, case):
    family, head_size, dtype = case
    lens, decodes = SHAPES[kernels.device.type]
    texts = at_random(*lens, vocab=VOCAB_SIZE)
    reference = make_decoder(family, head_size, kernels.device)
    ask = their_logits(texts)
    exact = exactly(reference, ask)
    theirs = None if dtype is torch.float32 else ask(narrowed(reference, dtype))
    model = injected(reference, dtype, kernels.device)
    shape = {"block_size": BLOCK, "num_blocks": NUM_BLOCKS}
    check(logits_of(model, kernels, texts, at_once(lens), **shape), exact, theirs, model)
    stepwise = logits_of(model, kernels, texts, in_steps(lens, decodes), **shape)
    for part in (slice(None, -decodes), slice(-decodes, None)):  # chunks, decodes; the first text is one token
        exact_part, our_part, their_part = (
            None if said is None else [text[part] for text in said[1:]] for said in (exact, stepwise, theirs)
        )
        check(our_part, exact_part, their_part, model)


def greedy_engine(reference: Any, device: torch.device) -> Engine:
    """An engine of a copy of the reference in float32, which cuts prompts into chunks."""
    model = injected(reference, torch.float32, device)
    card = ModelCard(
        name="test",
        architecture=type(reference).__name__,
        family="test",
        fingerprint="test",
        vocab_size=model.spec.vocab_size,
        max_model_len=model.spec.max_positions,
    )
    return Engine(model, card, EngineConfig(kv_tokens=1024, max_batch_tokens=100))


# A tied head likes to repeat what it reads; with this every text goes on to other tokens, and is still greedy.
GREEDY = {"max_tokens": STEPS, "frequency_penalty": 2.0}


def check_greedy(chosen: list[int], logits: torch.Tensor) -> None:
    """Each token is the one that the reference's logits [tokens, vocab] make largest, given the tokens before it.

    Two of them are taken as equally large if float32 cannot tell them apart, which one in 20,000 is.
    """
    assert len(chosen) == STEPS
    counts = torch.nn.functional.one_hot(torch.tensor(chosen), logits.shape[1]).cumsum(0)
    counts = counts.roll(1, 0).index_fill_(0, torch.tensor([0]), 0)
    wanted = logits - GREEDY["frequency_penalty"] * counts
    short = wanted.amax(-1) - wanted[torch.arange(STEPS), chosen]
    assert not (short > 1e-5 * logits.abs().max()).any(), (chosen, wanted.argmax(-1).tolist())
    assert len(set(chosen)) >= 3, "the model hardly says anything"


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.inference_mode()
def test_greedy_tokens(kernels: Kernels, family, head_size):
    prompts = at_random(1, 131, 50, vocab=VOCAB_SIZE, seed=4)
    reference = make_decoder(family, head_size, kernels.device)
    answers = generate(greedy_engine(reference, kernels.device), prompts, **GREEDY)
    texts = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    for answer, logits in zip(answers, exactly(reference, their_logits(texts)), strict=True):
        check_greedy(answer, logits[-STEPS:])


# ----------------------------------------------------------------------------------------------- encoders and T5


@cases([("BertForMaskedLM", 64, torch.float16)], product(ENCODERS, HEAD_SIZES, DTYPES))
@torch.inference_mode()
def test_encoders(kernels: Kernels, case):
    architecture, head_size, dtype = case
    lens, _ = SHAPES[kernels.device.type]
    texts = at_random(*lens, vocab=VOCAB_SIZE)
    reference = make_encoder(architecture, head_size, kernels.device)
    ask = their_states(texts)
    exact = exactly(reference, ask)
    theirs = None if dtype is torch.float32 else ask(narrowed(reference, dtype))
    model = injected(reference, dtype, kernels.device)
    check(encoder_states(model, kernels, texts), exact, theirs, model)


@cases([("t5-v1.1", 64, torch.float16)], product(T5_VARIANTS, HEAD_SIZES, DTYPES))
@torch.inference_mode()
def test_encoder_decoders(kernels: Kernels, case):
    variant, head_size, dtype = case
    lens, decodes = SHAPES[kernels.device.type]
    texts, sources = at_random(*lens, vocab=VOCAB_SIZE), at_random(*reversed(lens), vocab=VOCAB_SIZE, seed=3)
    reference = make_t5(variant, head_size, kernels.device)
    ask = their_answers(sources, texts)
    exact = exactly(reference, ask)
    theirs = None if dtype is torch.float32 else ask(narrowed(reference, dtype))
    model = injected(reference, dtype, kernels.device)
    for steps in (at_once(lens), in_steps(lens, decodes)):
        found = sourced_logits_of(model, kernels, sources, texts, steps, block_size=BLOCK, num_blocks=NUM_BLOCKS)
        check(found, exact, theirs, model)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("variant", list(T5_VARIANTS))
@torch.inference_mode()
def test_greedy_answers(kernels: Kernels, variant, head_size):
    sources = at_random(1, 131, 50, vocab=VOCAB_SIZE, seed=4)
    reference = make_t5(variant, head_size, kernels.device)
    answers = generate(greedy_engine(reference, kernels.device), sources, **GREEDY)
    texts = [[reference.config.decoder_start_token_id, *answer[:-1]] for answer in answers]
    for answer, logits in zip(answers, exactly(reference, their_answers(sources, texts)), strict=True):
        check_greedy(answer, logits)
