"""Peers that are not installed here, played by modules that look like them: what they are handed, and what is timed.

The fakes know what DeepSpeed 0.19 and vLLM 0.26 offer of what we use, and refuse anything else.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headrace.benchmarks import peers
from headrace.benchmarks.models import random_module
from headrace.benchmarks.peers import VLLM, DeepSpeed, Transformers
from headrace.benchmarks.session import Settings
from headrace.benchmarks.shapes import find_source
from headrace.benchmarks.subject import Room
from headrace.errors import ConfigError, UnsupportedModelError
from tests.support.tiny_models import save_model

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
ROOM = Room(sequences=3, length=9, tokens=27, step_tokens=64, seed=7)
TINY = find_source("tiny")


@pytest.fixture(autouse=True)
def versions(monkeypatch):
    """Nobody asks for those of packages that are not there."""
    monkeypatch.setattr(peers, "importlib", SimpleNamespace(metadata=SimpleNamespace(version=lambda name: f"{name} 1")))


def test_a_share_of_the_probability_needs_a_temperature():
    with pytest.raises(ConfigError, match="--temperature"):
        Settings.of({"temperature": 0.0, "top_p": 0.5})


class TestTransformers:
    def test_how_tokens_are_drawn(self):
        """Of all tokens; transformers keeps the fifty likeliest if it is not told otherwise."""
        given = []
        peer = Transformers(CPU)
        peer._module = SimpleNamespace(generate=lambda ids, **settings: given.append(settings) or _put(settings, ids))
        for sampling in ({}, {"temperature": 0.8, "top_p": 0.9}):
            peer.generate(PROMPTS, 5, **sampling)

        names = ("do_sample", "temperature", "top_p", "top_k")
        greedy, drawn = ({name: each[name] for name in names if name in each} for each in given)
        assert greedy == {"do_sample": False}
        assert drawn == {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}


def _put(settings, ids):
    """What `generate` does with a streamer."""
    for _ in range(1 + settings["max_new_tokens"]):
        settings["streamer"].put(None)
    return ids


class TestDeepSpeed:
    @pytest.fixture
    def made(self, monkeypatch):
        """What was injected, and the settings: those of its config, which takes no others."""
        made = []

        def init_inference(model, *, dtype, replace_with_kernel_inject, max_out_tokens):
            made.append((model, dtype, replace_with_kernel_inject, max_out_tokens))
            model.injected = True
            return SimpleNamespace(module=model)

        monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(init_inference=init_inference))
        return made

    def test_what_is_made(self, made):
        """The weights that ours has of the same seed, in their type, with room for the longest sequence."""
        found = DeepSpeed(CPU).load(TINY, ROOM)

        [(module, dtype, inject, tokens)] = made
        expected = random_module(TINY, CPU, ROOM.seed).state_dict()
        assert module.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert (dtype, inject) == (torch.float32, True)
        assert tokens > ROOM.length
        assert found["version"] == "deepspeed 1"

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}])
    def test_a_timeline(self, made, monkeypatch, sampling):
        peer = DeepSpeed(CPU)
        peer.load(TINY, ROOM)
        [(module, *_)] = made
        given, out = [], []
        generate = module.generate

        def seen(ids, **settings):
            given.append(ids.tolist())
            out.append(generate(ids, **settings))
            return out[0]

        monkeypatch.setattr(module, "generate", seen)
        begun = []
        timeline = peer.generate(PROMPTS, 5, on_decode=lambda: begun.append(True), **sampling)

        assert given == [PROMPTS]
        assert out[0].shape == (3, 4 + 5)
        assert begun == [True]
        assert len(timeline.gaps) == 4
        assert 0 < timeline.first < timeline.total
        assert timeline.first + sum(timeline.gaps) <= timeline.total

    def test_end_tokens_are_ignored(self, made):
        """A model that says nothing else."""
        peer = DeepSpeed(CPU)
        peer.load(TINY, ROOM)
        [(module, *_)] = made
        module.generation_config.eos_token_id = list(range(module.config.vocab_size - 1))

        assert len(peer.generate(PROMPTS, 5).gaps) == 4

    def test_where_injection_fails(self, monkeypatch):
        def refuse(model, **_):
            raise RuntimeError("no such kernel")

        monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(init_inference=refuse))
        with pytest.raises(RuntimeError, match="no such kernel"):
            DeepSpeed(CPU).load(TINY, ROOM)


@dataclass
class SamplingParams:
    """As much as is used."""

    temperature: float
    top_p: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool


@dataclass
class LLM:
    """Generates a token for every request in each step, but reads just so many new prompts in one.

    Its outputs are those of requests that got a token, each with all tokens so far.
    """

    model: str
    load_format: str
    dtype: str
    quantization: str | None
    skip_tokenizer_init: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    gpu_memory_utilization: float
    seed: int
    config: dict = field(init=False)

    per_step = 2
    lost = 0  # tokens that each request ends early by

    def __post_init__(self):
        self.config = json.loads((Path(self.model) / "config.json").read_text())
        self.llm_engine = self
        self.asked = []
        self._running = {}

    def add_request(self, request_id, prompt, params):
        assert isinstance(request_id, str)
        assert request_id not in {name for name, *_ in self.asked}
        assert prompt.keys() == {"prompt_token_ids"}
        self.asked.append((request_id, prompt["prompt_token_ids"], params))
        self._running[request_id] = (params.max_tokens - self.lost, [])

    def has_unfinished_requests(self):
        return bool(self._running)

    def step(self):
        new = [name for name, (_, tokens) in self._running.items() if not tokens][: self.per_step]
        outputs = []
        for name, (most, tokens) in list(self._running.items()):
            if tokens or name in new:
                tokens.append(1)
                outputs.append(
                    SimpleNamespace(
                        request_id=name,
                        outputs=[SimpleNamespace(token_ids=list(tokens))],
                        finished=len(tokens) == most,
                    )
                )
                if len(tokens) == most:
                    del self._running[name]
        return outputs


class TestVLLM:
    @pytest.fixture
    def peer(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
        monkeypatch.setattr(peers.time, "perf_counter", itertools.count().__next__)  # a second a look
        peer = VLLM(torch.device("cuda"))
        yield peer
        peer.unload()

    def test_what_is_made_of_a_shape(self, peer):
        """Its config, with weights of vLLM's own, from the same seed; room for all sequences, and nothing cached."""
        found = peer.load(TINY, ROOM)

        llm = peer._llm
        assert (llm.load_format, llm.dtype, llm.quantization, llm.seed) == ("dummy", "float32", None, ROOM.seed)
        assert llm.config["architectures"] == ["LlamaForCausalLM"]
        assert llm.skip_tokenizer_init
        assert not llm.enable_prefix_caching
        assert (llm.max_num_seqs, llm.max_num_batched_tokens) == (3, 64)
        assert llm.max_model_len > ROOM.length
        assert llm.gpu_memory_utilization == pytest.approx(0.85 * 0.6)
        assert found["version"] == "vllm 1"

    def test_a_model_with_weights(self, peer, tmp_path):
        save_model(tmp_path)
        peer.load(find_source(str(tmp_path)), ROOM)

        assert (peer._llm.model, peer._llm.load_format) == (str(tmp_path), "auto")

    @pytest.mark.parametrize(
        ("given", "expected"), [({}, (0.0, 1.0)), ({"temperature": 0.8, "top_p": 0.9}, (0.8, 0.9))]
    )
    def test_what_is_asked_for(self, peer, given, expected):
        """The prompts in order, in two rounds of requests with names of their own; no end token ends one."""
        peer.load(TINY, ROOM)
        for _ in range(2):
            peer.generate(PROMPTS, 5, **given)

        assert [prompt for _, prompt, _ in peer._llm.asked] == PROMPTS * 2
        for _, _, params in peer._llm.asked:
            assert (params.temperature, params.top_p) == expected
            assert params.max_tokens == 5
            assert params.ignore_eos
            assert not params.detokenize

    def test_a_timeline(self, peer):
        """Two prompts are read in the first step and one in the second: all decode in the second to the fifth.

        The clock goes on by one with each look: at the start, after each of six steps, and at the end.
        """
        peer.load(TINY, ROOM)
        begun = []
        timeline = peer.generate(PROMPTS, 5, on_decode=lambda: begun.append(True))

        assert begun == [True]
        assert timeline.first == 2
        assert timeline.gaps == [1, 1, 1]
        assert timeline.total == 7

    def test_tokens_that_are_missing(self, peer, monkeypatch):
        monkeypatch.setattr(LLM, "lost", 1)
        peer.load(TINY, ROOM)
        with pytest.raises(AssertionError, match=r"\[4, 4, 4\] tokens instead of 5 each"):
            peer.generate(PROMPTS, 5)

    @pytest.mark.parametrize(
        ("device", "shape", "why"), [("cpu", "tiny", "on GPUs only"), ("cuda", "tiny-bert", "generate only")]
    )
    def test_what_is_refused_before_it_starts(self, monkeypatch, device, shape, why):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=None))  # it cannot be made
        with pytest.raises(UnsupportedModelError, match=why):
            VLLM(torch.device(device)).load(find_source(shape), ROOM)
