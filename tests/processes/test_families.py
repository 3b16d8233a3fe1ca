"""Every family served by real processes: folder, launcher, worker, broker, client, and back the tokens of transformers.

What a family computes is tested in tests/kernels, how an engine cuts and mixes it in tests/workers. This is the whole
way of a model from `save_pretrained` to a client, on which a family can differ too: in its config, its files, its card,
its generation settings, its encoder.

One broker serves all. A worker costs three seconds of a core, nearly all of them imports, so a few groups run at a
time, started together, and transformers answers the same prompts meanwhile. Still, all variants take a core two
minutes. So every run serves each family, and of a family the variants that are loaded in another way: other tensors
(OPT 350M's projections, Falcon's three layouts of queries, keys and values, T5's gate and its head of its own), or a
config with a structure of its own (scaled rotary positions, windows). The rest, which differ in numbers, are `slow`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from headrace.kernels.policies import POLICIES
from headrace.kernels.policies.base import Policy
from headrace.kernels.policies.examples import Examples, examples
from headrace.workers.config import EngineConfig
from headrace.workers.group import GroupSpec
from tests.support.tiny_models import FAMILIES, T5_VARIANTS, save_model, save_t5
from tests.support.tiny_tokenizer import tiny_tokenizer_json
from tests.support.worker_pool import Groups, WorkerPool

STEPS = 32
# Tokens of a step: the last prompt is read in several, among the tokens of the others.
CONFIG = EngineConfig(max_batch_tokens=24, kv_tokens=1024, block_size=8, dtype="float32", device="cpu")
PROMPTS = (
    "w",
    "hello world",
    "One mill stands by the river, and its wheel turns.",
    "A headrace is the channel that carries water to a wheel: " + ", ".join(f"wheel {n}" for n in range(12)),
)

ALWAYS = (
    *("gpt2", "gptj", "gpt_neox", "opt", "opt-350m", "bloom", "falcon-7b", "falcon-40b", "falcon-rw"),
    *("llama", "llama3-rope", "mistral-window", "mixtral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"),
    *("t5", "t5-v1.1"),
)
SLOW = tuple(name for name in (*FAMILIES, *T5_VARIANTS) if name not in ALWAYS)
NAMES = (*ALWAYS, *SLOW)
AT_ONCE = 4
SEED = 2  # of the weights; with many others some families say the same few tokens for ever


class Waves:
    """Serves a few families at a time, each by its name, and asks transformers what to expect of them."""

    def __init__(self, pool: WorkerPool, folders: pytest.TempPathFactory) -> None:
        self._pool = pool
        self._folders = folders
        self._groups: Groups | None = None
        self._expected: dict[str, list[list[int]]] = {}

    def serve(self, name: str) -> list[list[int]]:
        """See that a family is served, with its neighbours; what transformers says to PROMPTS."""
        if name not in self._expected:
            self.close()
            first = NAMES.index(name) // AT_ONCE * AT_ONCE
            self._start(NAMES[first : first + AT_ONCE])
        return self._expected[name]

    def close(self) -> None:
        """End the groups that run."""
        if self._groups is not None:
            self._groups.close()

    def _start(self, names: tuple[str, ...]) -> None:
        folders = {name: self._folders.mktemp(name) for name in names}
        models = {
            name: (save_t5 if name in T5_VARIANTS else save_model)(folders[name], name, seed=SEED) for name in names
        }
        specs = [
            GroupSpec(name=name, folder=folder, model_name=name, config=CONFIG, threads=1)
            for name, folder in folders.items()
        ]
        self._groups = Groups(specs, self._pool.worker_endpoint)
        self._expected = {name: [greedy(model, prompt) for prompt in PROMPTS] for name, model in models.items()}
        for name in names:
            self._groups.wait_for(name, "ready")


@pytest.fixture(scope="module")
def pool():
    """A broker; its groups come in waves."""
    with tempfile.TemporaryDirectory(prefix="hr") as folder:
        pool = WorkerPool(Path(folder))
        pool.start_broker()
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def waves(pool, tmp_path_factory):
    waves = Waves(pool, tmp_path_factory)
    yield waves
    waves.close()


def greedy(model: Any, prompt: str) -> list[int]:
    """What transformers says, end tokens included."""
    ids = torch.tensor([Tokenizer.from_buffer(tiny_tokenizer_json()).encode(prompt).ids])
    with_encoder = model.config.is_encoder_decoder
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        # Its own cache fails if a decoder has more layers than its encoder.
        use_cache=not with_encoder,
    )
    return out[0, 1 if with_encoder else ids.shape[1] :].tolist()


def test_no_family_is_left_out():
    served = {FAMILIES[name][0] if name in FAMILIES else "t5" for name in ALWAYS}
    cases = examples()
    assert served == {policy.family for policy in POLICIES if generates(policy, cases[policy.family])}


def generates(policy: Policy, cases: Examples) -> bool:
    return not any(policy.spec(config).is_encoder for config in cases.covered.values())


@pytest.mark.parametrize("name", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_served_family_says_what_transformers_says(pool, waves, name):
    expected = waves.serve(name)
    assert len({token for tokens in expected for token in tokens}) >= 5, "the model hardly says anything"
    settings = {"model": name, "temperature": 0.0, "max_tokens": STEPS, "ignore_eos": True}
    items = list(pool.client.map(PROMPTS, **settings))
    assert [item.error for item in items] == [None] * len(PROMPTS)
    assert [list(item.completion.choices[0].token_ids) for item in items] == expected
    text = pool.client.text(name)
    assert [item.completion.text for item in items] == [text.decode(tokens) for tokens in expected]
    assert items[-1].completion.usage.prompt_tokens > 2 * CONFIG.max_batch_tokens
