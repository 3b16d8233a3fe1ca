"""The real engine under real kills: a tiny random LLaMA, written by transformers, loaded in a process of its own."""

import os
import signal

import pytest
import torch

from headrace.workers.config import EngineConfig
from headrace.workers.group import GroupSpec
from tests.support.children import wait_until
from tests.support.tiny_models import save_model

COUNT = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model of transformers, and its folder."""
    folder = tmp_path_factory.mktemp("llama")
    return save_model(folder, "llama", max_position_embeddings=1024, num_hidden_layers=6), folder


def greedy(model, prompt):
    """What transformers says, end tokens included."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def test_the_greedy_continuation_is_identical_after_sigkill(pool, model):
    reference, folder = model
    pool.start_broker()
    config = EngineConfig(kv_tokens=4096, dtype="float32")
    groups = pool.start_groups(GroupSpec(name="a", folder=folder, model_name="llama", config=config, threads=1))
    loading = [(event.done, event.total) for event in groups.events if event.kind == "loading"]
    assert loading[-1][0] == loading[-1][1] > 0
    prompt = list(b"hello world, this is a river")
    got = []
    with pool.client.stream(token_ids=prompt, max_tokens=COUNT, temperature=0.0, ignore_eos=True) as stream:
        for delta in stream:
            got += delta.token_ids
            if len(got) >= 40 and groups.kinds("a").count("lost") == 0:
                os.kill(groups.pid("a"), signal.SIGKILL)
                wait_until(lambda: "lost" in groups.kinds("a"), "the launcher notices")
    assert got == greedy(reference, prompt)
    counters = pool.client.status()["counters"]
    assert counters["resumed_tokens_total"] >= 40
    assert sum(counters["redispatch_total"].values()) == 1
