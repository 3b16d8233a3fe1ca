"""Pairs of a transformers model and an engine with the same weights, made once for all tests."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from headrace.workers.inference import init_inference
from tests.support.graphs_on_cpu import Pretended
from tests.support.tiny_encoders import make_any
from tests.support.tiny_models import save_model


@functools.cache
def _pair(name):
    reference = make_any(name)
    if getattr(reference.config, "attn_logit_softcapping", None):
        reference.set_attn_implementation("eager")  # older transformers leave the cap out of the fused one
    # Made in any test, also where graphs are pretended.
    return reference, init_inference(copy.deepcopy(reference), device="cpu", cuda_graphs=False)


@pytest.fixture(scope="session")
def pair():
    """By family's name: the model of transformers, and an engine that was made of a copy."""
    return _pair


@functools.cache
def _pair_with_graphs(name):
    reference, _ = _pair(name)
    return reference, init_inference(copy.deepcopy(reference), device="cpu", cuda_graphs=True)


@pytest.fixture
def pretended(monkeypatch):
    """Graphs that a CPU has for the time of a test."""
    return Pretended(monkeypatch)


@pytest.fixture
def pair_with_graphs(pretended):
    """As `pair`, with an engine that decodes by such graphs."""
    return _pair_with_graphs


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
