"""A step never waits for the GPU but where its tokens are read: what waits cannot be captured, and idles the GPU.

PyTorch raises an error at most of what waits, copies from unpinned memory included, but knows nothing of what Triton or
the driver do. Prompts are held to it as well as decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from headrace.messages import Assignment
from headrace.workers.engine import Engine, EngineConfig
from headrace.workers.engines import load_engine
from headrace.workers.sampler import Choices
from tests.support.engines import Outcome, assign, run
from tests.support.tiny_models import save_model, save_t5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

# Rotary positions of one kind, of two, of halves and of neighbours, none; windows; ALiBi; experts; cross attention.
MODELS = ["llama", "gemma3", "gptj", "gpt2", "bloom", "falcon-rw", "mixtral", "t5"]

SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 3},
    "top-k": {"temperature": 1.0, "seed": 3, "top_k": 20},
    "top-p": {"temperature": 1.0, "seed": 3, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "bias": {"logit_bias": [[7, 5.0]], "stop_token_ids": [7], "min_tokens": 4},
    "logprobs": {"logprobs": 3, "temperature": 1.0, "seed": 5},
}


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """What PyTorch does when something waits for the GPU: "error" or "default", which is nothing."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def nothing_waits(monkeypatch):
    """From here on whatever waits is an error, but for the reading of tokens."""
    read = Choices.read

    def allowed(choices):
        with sync_mode("default"):
            return read(choices)

    monkeypatch.setattr(Choices, "read", allowed)
    return lambda: sync_mode("error")


def load(folder, **config) -> Engine:
    # Without shared prefixes a second run computes the same steps as the first, so that nothing is left to compile.
    settings = {"kv_tokens": 2048, "block_size": 16, "dtype": "bfloat16", "device": "cuda", "prefix_cache": False}
    engine = load_engine(folder, EngineConfig(**settings | config))
    assert isinstance(engine, Engine)
    return engine


def streams(names) -> list[Assignment]:
    """Streams that differ in length, so that their prompts come in chunks beside decodes."""
    prompts = [[(7 * index + 3 * place) % 250 for place in range(5 + 20 * index)] for index in range(len(names))]
    return [
        assign(prompt, request=index, max_tokens=10, **SAMPLING[name])
        for index, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]


def tokens(outcomes: list[Outcome]) -> list[list[int]]:
    assert all(outcome.error is None for outcome in outcomes)
    return [outcome.tokens for outcome in outcomes]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_step_of_a_warmed_engine_waits(nothing_waits, name, graphs, tmp_path):
    (save_t5 if name == "t5" else save_model)(tmp_path, name)
    engine = load(tmp_path, max_batch_tokens=48, cuda_graphs=graphs)
    engine.warm_up()
    mixed = streams(list(SAMPLING))
    warm = tokens(run(engine, mixed))
    with nothing_waits():
        assert tokens(run(engine, mixed)) == warm
    assert sum(map(len, warm)) > 40


@pytest.mark.parametrize("name", list(SAMPLING))
def test_no_way_to_sample_waits(nothing_waits, name, tmp_path):
    save_model(tmp_path)
    engine = load(tmp_path)
    alone = streams([name] * 3)
    warm = tokens(run(engine, alone))
    with nothing_waits():
        assert tokens(run(engine, alone)) == warm


def test_what_waits_is_an_error(nothing_waits, tmp_path):
    save_model(tmp_path)
    engine = load(tmp_path)
    run(engine, streams(["greedy"]))
    model = engine._runner.model
    model.register_forward_hook(lambda module, args, output: float(output[0, 0]))
    with nothing_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        run(engine, streams(["greedy"]))
