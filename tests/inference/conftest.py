"""Pairs of a transformers model and an engine with the same weights, made once for all tests."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from headrace.workers.inference import init_inference
from tests.support.tiny_encoders import ENCODERS, TASKS, make_encoder
from tests.support.tiny_models import T5_VARIANTS, make_model, make_t5, save_model


@functools.cache
def _pair(name):
    make = make_t5 if name in T5_VARIANTS else make_encoder if name in ENCODERS | TASKS else make_model
    reference = make(name)
    if getattr(reference.config, "attn_logit_softcapping", None):
        reference.set_attn_implementation("eager")  # older transformers leave the cap out of the fused one
    return reference, init_inference(copy.deepcopy(reference), device="cpu")


@pytest.fixture(scope="session")
def pair():
    """By family's name: the model of transformers, and an engine that was made of a copy."""
    return _pair


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved model, with its tokenizer."""
    path = tmp_path_factory.mktemp("qwen2")
    save_model(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
