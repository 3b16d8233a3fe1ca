"""An encoder served by real processes: vectors and words as transformers has them, and under a real kill."""

import os
import signal
import threading

import pytest
import torch

from headrace.workers.config import EngineConfig
from headrace.workers.group import GroupSpec
from tests.support.children import wait_until
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_tokenizer import MASK

CONFIG = EngineConfig(dtype="float32", max_batch_tokens=128)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model of transformers, and its folder."""
    folder = tmp_path_factory.mktemp("bert")
    return save_encoder(folder, "bert", max_position_embeddings=64), folder


@torch.inference_mode()
def expected(reference, ids):
    hidden = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
    return hidden / hidden.norm()


def test_vectors_and_words_are_those_of_transformers_also_after_sigkill(pool, model):
    reference, folder = model
    pool.start_broker()
    spec = GroupSpec(name="a", folder=folder, model_name="bert", config=CONFIG, threads=1)
    groups = pool.start_groups(spec)
    client = pool.client
    text = client.text()

    source = "hello [MASK], this is a [MASK]"
    ids = text.encode(source)
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0]
    fills = client.fill_mask(source, top_k=4)
    for likeliest, place in zip(fills, [place for place, token in enumerate(ids) if token == MASK], strict=True):
        wanted = logits[place].softmax(-1).topk(4)
        assert [fill.token_id for fill in likeliest] == wanted.indices.tolist()
        assert [fill.probability for fill in likeliest] == pytest.approx(wanted.values.tolist(), rel=1e-4)

    texts = [f"text number {index}, {'x' * (index % 30)}" for index in range(3000)]
    found = []
    reader = threading.Thread(target=lambda: found.append(client.embed(texts)))
    reader.start()
    wait_until(lambda: client.status()["counters"]["requests_total"] > 500, "texts are being read")
    os.kill(groups.pid("a"), signal.SIGKILL)
    reader.join(120)
    assert groups.kinds("a").count("lost") == 1
    (vectors,) = found
    assert len(vectors) == len(texts)
    for index in range(0, len(texts), 50):
        vector = torch.tensor(vectors[index])
        torch.testing.assert_close(vector, expected(reference, text.encode(texts[index])), rtol=1e-4, atol=1e-5)
