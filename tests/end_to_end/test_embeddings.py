"""A real embedding model, all-MiniLM-L6-v2, through everything: vectors as in transformers, and they mean something."""

from __future__ import annotations

import openai
import pytest
import torch

from headrace.client import Client
from headrace.errors import ModelNotFoundError
from tests.support.up import Up

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply today.",
    "Share prices dropped.",
    "Grüße aus Köln, 日本!",
    "word " * 400,
]


@pytest.fixture(scope="module")
def folder():
    from headrace.workers.models import resolve

    try:
        return resolve(MODEL)
    except ModelNotFoundError as error:
        pytest.skip(f"no source of {MODEL} can be reached: {error.message}")


@pytest.fixture(scope="module")
def pool(folder):
    with Up(MODEL) as up:
        yield up.wait_ready(limit=240)


@pytest.fixture(scope="module")
def vectors(pool):
    with Client(pool.endpoint) as client:
        found = client.embed(TEXTS)
    return torch.tensor([list(vector) for vector in found])


@torch.inference_mode()
def test_they_are_those_of_transformers(folder, vectors):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(TEXTS, vectors, strict=True):
        state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, state / state.norm(), rtol=1e-4, atol=1e-5)


def test_texts_that_mean_the_same_are_near(vectors):
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.6
    assert cosines[2, 3] > 0.6
    assert cosines[0, 2] < 0.2
    assert cosines[1, 3] < 0.2


def test_the_openai_sdk_gets_the_same(pool, vectors):
    with openai.OpenAI(base_url=f"{pool.page}v1", api_key="none") as sdk:
        found = sdk.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS[:2])
    torch.testing.assert_close(torch.tensor([data.embedding for data in found.data]), vectors[:2], rtol=1e-4, atol=1e-5)
    assert found.usage.prompt_tokens > 10
