"""What READY promises on a GPU: nothing is compiled or captured afterwards, and memory stays within what is allowed."""

from __future__ import annotations

import random

import pytest
import torch

from headrace.messages import Assignment, StreamId, pack_tokens
from headrace.sampling import SamplingParams
from headrace.workers.config import EngineConfig
from headrace.workers.engines import load_engine
from headrace.workers.warmup import _OPTIONS
from tests.support.tiny_models import save_model, save_t5

pytestmark = pytest.mark.gpu

FAMILIES = ["llama", "qwen2-tied", "gpt2", "gemma2", "bloom", "mixtral", "t5"]


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def options_of(chance):
    """Settings of a sampler as a request may have them: of one kind, or of several at once."""
    options = {"temperature": 0.7}
    for picked in chance.sample(_OPTIONS, chance.choice((0, 1, 1, 2, 4))):
        options |= picked
    if "min_tokens" not in options and chance.random() < 0.3:
        options["stop_token_ids"] = [chance.randrange(50)]
    return options | {"seed": chance.randrange(1 << 40)}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_compiled_once_it_is_ready(tmp_path, family, graphs):
    """Prompts of many lengths, every setting, log probabilities, cancels, and so few blocks that streams give way."""
    (save_t5 if family == "t5" else save_model)(tmp_path, family)
    config = EngineConfig(kv_tokens=1600, max_num_seqs=20, max_batch_tokens=300, cuda_graphs=graphs)
    engine = load_engine(tmp_path, config)
    engine.warm_up()
    ready = engine.load_gauges()
    assert ready["compilations"] == 0
    chance = random.Random(7)
    for number in range(150):
        length = chance.choice((1, 2, 3, 7, 16, 17, 31, 64, 65, 100, 129, 250, 300, 400))
        room = 512 - length
        sampling = options_of(chance) | {"max_tokens": chance.randint(2, min(room, 110)), "ignore_eos": True}
        SamplingParams.from_wire(sampling)
        prompt = pack_tokens(chance.randrange(engine.card.vocab_size) for _ in range(length))
        engine.add(Assignment(request=b"%d" % number, choice=0, attempt=0, prompt=prompt, sampling=sampling), now=0.0)
        for _ in range(chance.choice((0, 0, 1, 3, 30))):
            engine.step(0.0)
        if chance.random() < 0.1:
            engine.revoke(StreamId(b"%d" % chance.randrange(number + 1), 0, 0))
        after = engine.load_gauges()
        assert after["compilations"] == 0, (number, length, sampling)
    while engine.has_work:
        engine.step(0.0)
    engine.validate()
    after = engine.load_gauges()
    assert after["compilations"] == 0
    assert after["graphs"] == ready["graphs"] == (0 if not graphs else ready["graphs"])
    assert after["preemptions"] > ready["preemptions"] or family == "t5"
    if graphs:
        assert after["graph_replays"] > 100


def test_an_engine_holds_no_more_than_its_share(tmp_path):
    save_model(tmp_path, "llama", vocab_size=151_936, hidden_size=768, intermediate_size=3072, num_hidden_layers=6)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    held = total - free + torch.cuda.memory_allocated() - torch.cuda.memory_reserved()
    share = held / total + 0.05
    config = EngineConfig(max_num_seqs=256, max_batch_tokens=4096, gpu_memory_utilization=share, max_model_len=512)
    engine = load_engine(tmp_path, config)
    engine.warm_up()
    for number in range(300):
        prompt = pack_tokens((number * 7 + place) % 1000 for place in range(100))
        sampling = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 20, "logprobs": 5, "ignore_eos": True}
        engine.add(Assignment(request=b"%d" % number, choice=0, attempt=0, prompt=prompt, sampling=sampling), 0.0)
    while engine.has_work:
        engine.step(0.0)
    free, total = torch.cuda.mem_get_info()
    own = total - free - held
    assert own <= share * total
    assert engine.load_gauges()["kv_blocks_total"] > 100
