"""CUDA graphs of the library: when there are some, when not, and what the report says. Here they are pretended."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from headrace.errors import ConfigError
from headrace.workers.inference import init_inference
from tests.inference.batches import padded
from tests.support.graphs_on_cpu import Pretended
from tests.support.tiny_encoders import make_any
from tests.support.tiny_models import make_model
from tests.support.tiny_tokenizer import END_OF_TEXT

IDS, MASK = padded([11, 3, 1])
QUIET = {"do_sample": False, "eos_token_id": None, "pad_token_id": END_OF_TEXT, "max_new_tokens": 6}
PROMPTS = [[5, 60, 7], [200], list(range(40, 70))]
GREEDY = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")
NOT_PERMITTED = RuntimeError("CUDA error: operation not permitted when stream is capturing\nMore lines.")


def make(name="llama", **settings):
    torch.manual_seed(0)
    return init_inference(make_any(name), device="cpu", **settings)


def road(engine, call="generate"):
    return engine.report().graphs[call]


def replays(engine):
    return engine._kind.replays.num_replays


class Calls(LogitsProcessor):
    """Does something at each step of the loop."""

    def __init__(self, act):
        self.act = act
        self.count = 0

    def __call__(self, input_ids, scores):
        self.act(self.count)
        self.count += 1
        return scores


def at_each_step(act):
    return LogitsProcessorList([Calls(act)])


# ------------------------------------------------------------------------------------------------------- where they are


@pytest.mark.parametrize("setting", [None, False])
def test_a_cpu_has_none(pair, setting):
    engine = make(cuda_graphs=setting)
    engine.generate(IDS, MASK, **QUIET)
    engine.generate_many(PROMPTS, **GREEDY)
    why = "without: cpu has none" if setting is None else "without: cuda_graphs is False"
    assert engine.report().graphs == {"generate": why, "streams": why}
    assert f"generate {why}; streams {why}" in str(engine.report())


def test_they_cannot_be_promised_on_a_cpu():
    module = make_model("llama")
    with pytest.raises(ConfigError, match="cuda_graphs is True, but the LlamaForCausalLM goes to 'cpu'") as caught:
        init_inference(module, device="cpu", cuda_graphs=True)
    assert caught.value.param == "cuda_graphs"
    module(IDS)  # it was left as it was


def test_a_folder_is_refused_before_its_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr("headrace.workers.inference.sources.loading", None)
    with pytest.raises(ConfigError, match="goes to 'cpu', which has none"):
        init_inference(folder, device="cpu", cuda_graphs=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "mixtral", "t5"])
@pytest.mark.parametrize("lens", [[7], [11, 3], [9, 3, 1, 20, 5]])
def test_tokens_are_those_without(pair, pair_with_graphs, name, lens):
    ids, mask = padded(lens)
    engine = pair_with_graphs(name)[1]
    before = replays(engine)
    expected = pair(name)[1].generate(ids, mask, **QUIET)
    assert torch.equal(engine.generate(ids, mask, **QUIET), expected)
    assert replays(engine) - before == (6 if name == "t5" else 5), "all but the prompts"
    assert engine.generate_many(PROMPTS, **GREEDY) == pair(name)[1].generate_many(PROMPTS, **GREEDY)


def test_as_the_kernels_compute_it(pair, monkeypatch):
    """They know how long contexts are from the device alone."""
    pytest.importorskip("triton")
    Pretended(monkeypatch, interpreted=True)
    engine, settings = make(), QUIET | {"max_new_tokens": 3}
    expected = make(cuda_graphs=False).generate(IDS[:2], MASK[:2], **settings)
    assert torch.equal(engine.generate(IDS[:2], MASK[:2], **settings), expected)
    assert replays(engine) == 2


def test_random_texts_are_those_without(pair, pair_with_graphs):
    texts, streams = [], []
    for engine in (pair("llama")[1], pair_with_graphs("llama")[1]):
        torch.manual_seed(3)
        texts.append(engine.generate(IDS, MASK, **QUIET | {"do_sample": True, "top_p": 0.9}))
        streams.append(engine.generate_many(PROMPTS, max_tokens=9, temperature=1.5, seed=7))
    assert torch.equal(*texts)
    assert streams[0] == streams[1]


# ------------------------------------------------------------------------------------------ when they are made and kept


def test_they_are_captured_before_the_first_token_and_kept(pretended):
    engine, seen = make(), []
    assert road(engine) == "captured when first needed"
    for _ in range(2):
        engine.generate(IDS, MASK, **QUIET, logits_processor=at_each_step(lambda _: seen.append([*pretended.sizes])))
    assert seen == [[4]] * 12
    assert road(engine) == "1 captured, 10 steps replayed"
    engine.generate(IDS[:1], MASK[:1], **QUIET)
    assert pretended.sizes == [4, 1]
    # What needs more room than there is moves everything.
    engine.generate(IDS, MASK, **QUIET | {"max_new_tokens": 300, "min_new_tokens": 300})
    engine.generate(IDS, MASK, **QUIET)
    assert pretended.sizes == [4, 1, 4]
    assert len(pretended.alive) == 1


def test_those_of_streams_too(pretended):
    engine = make()
    assert road(engine, "streams") == "captured when first needed"
    one = engine.stream(PROMPTS[0], **GREEDY)
    assert pretended.sizes == [1]
    next(one)
    others = [engine.stream(prompt, **GREEDY) for prompt in PROMPTS[1:]]
    assert pretended.sizes == [1, 2, 4]
    assert [len(list(stream)) for stream in (one, *others)] == [5, 6, 6]
    engine.generate_many(PROMPTS, **GREEDY)
    assert pretended.sizes == [1, 2, 4]
    assert road(engine, "streams").startswith("3 captured, ")
    assert road(engine) == "captured when first needed"


def test_a_model_with_few_positions(pretended):
    engine = make(max_tokens=20)
    engine.generate(IDS[:, -3:], MASK[:, -3:], **QUIET)
    assert road(engine) == "1 captured, 5 steps replayed"


def test_what_was_captured_goes_with_the_engine(pretended):
    engine = make()
    out = engine.generate(IDS, MASK, **QUIET, return_dict_in_generate=True)
    stream = engine.stream(PROMPTS[0], **GREEDY)
    list(stream)
    assert len(pretended.alive) == 2
    engine.destroy()
    gc.collect()
    assert not pretended.alive
    assert out.sequences.shape == (3, 17)  # whatever of it somebody keeps
    assert stream.finish_reason == "length"


def test_a_cache_that_is_kept_keeps_no_weights(pretended):
    engine = make()
    out = engine.generate(IDS, MASK, **QUIET, return_dict_in_generate=True)
    model = weakref.ref(engine.module)
    del engine
    gc.collect()
    assert out.sequences.shape == (3, 17)
    assert model() is None


# -------------------------------------------------------------------------------------------------- when they cannot be


def test_hooks_are_called_at_every_step(pretended):
    engine, calls = make(), []
    expected = engine.generate(IDS, MASK, **QUIET)
    hook = engine.module.blocks[1].register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(engine.generate(IDS, MASK, **QUIET), expected)
    assert len(calls) == 6
    assert road(engine) == "without: they would leave out a hook on blocks.1"
    engine.generate_many(PROMPTS[:1], **GREEDY)
    assert len(calls) == 12
    assert road(engine, "streams") == "without: they would leave out a hook on blocks.1"
    hook.remove()
    before = replays(engine)
    assert torch.equal(engine.generate(IDS, MASK, **QUIET), expected)
    assert replays(engine) - before == 5
    assert len(calls) == 12


def test_hooks_on_everything_count(pretended):
    engine, calls = make(), []
    with nn.modules.module.register_module_forward_pre_hook(lambda *args: calls.append(1)):
        engine.generate(IDS, MASK, **QUIET)
        assert road(engine) == "without: they would leave out a hook on all modules"
    assert len(calls) > 6 * len(engine.module.blocks)


def test_a_hook_that_comes_in_the_middle(pretended):
    engine, calls, hooks = make(), [], []

    def act(step):
        if step == 2:
            hooks.append(engine.module.final_norm.register_forward_pre_hook(lambda *args: calls.append(1)))

    expected = engine.generate(IDS, MASK, **QUIET)
    assert torch.equal(engine.generate(IDS, MASK, **QUIET, logits_processor=at_each_step(act)), expected)
    assert len(calls) == 3
    assert road(engine) == "without: they would leave out a hook on final_norm"
    hooks[0].remove()
    stream = engine.stream(PROMPTS[0], **GREEDY)
    next(stream)
    act(2)
    assert len(list(stream)) == 5
    assert len(calls) >= 3 + 4


def test_modules_of_ones_own_are_called(pretended):
    class Counting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    engine = make("gpt2")
    expected = engine.generate(IDS, MASK, **QUIET)
    block = engine.module.blocks[0]
    block.qkv, block.mlp.up = Counting(block.qkv), Counting(block.mlp.up)
    assert torch.equal(engine.generate(IDS, MASK, **QUIET), expected)
    assert block.qkv.calls == block.mlp.up.calls == 6
    assert road(engine) == "without: they would leave out blocks.0.qkv, which is a Counting of your own"


def test_a_forward_of_ones_own_is_called(pretended):
    engine, calls = make(), []
    norm = engine.module.final_norm
    inner = norm.forward
    norm.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    engine.generate(IDS, MASK, **QUIET)
    assert len(calls) == 6
    assert road(engine) == "without: they would leave out the forward of final_norm, which is not its own"


@pytest.mark.parametrize("call", ["generate", "streams"])
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OUT_OF_MEMORY, "there is no memory for them (CUDA out of memory. Tried to allocate 2 GiB); lower max_tokens"),
        (
            NOT_PERMITTED,
            "the model cannot be captured (CUDA error: operation not permitted when stream is capturing)",
        ),
    ],
)
def test_what_cannot_be_captured_is_computed_without(pair, pretended, call, error, why):
    engine, insisting = make(), make(cuda_graphs=True)
    plain = pair("llama")[1]

    def use(engine):
        if call == "streams":
            return engine.generate_many(PROMPTS, **GREEDY)
        return engine.generate(IDS, MASK, **QUIET).tolist()

    pretended.error = error
    assert use(engine) == use(make(cuda_graphs=False))
    assert road(engine, call) == f"without: {why}"
    with pytest.raises(ConfigError) as caught:
        use(insisting)
    assert caught.value.param == "cuda_graphs"
    assert f"this call cannot use any: {why}. Leave cuda_graphs out" in str(caught.value)
    # Memory comes back; what cannot be captured is not tried again and again.
    pretended.error = None
    use(engine)
    assert bool(pretended.sizes) == (error is OUT_OF_MEMORY)
    assert plain.report().graphs[call]  # of another engine


def test_what_could_not_be_captured_may_be_replaced(pretended):
    engine = make()
    pretended.error = NOT_PERMITTED
    engine.generate(IDS, MASK, **QUIET)
    pretended.error = None
    engine.module.final_norm = copy.deepcopy(engine.module.final_norm)
    engine.generate(IDS, MASK, **QUIET)
    assert road(engine) == "1 captured, 5 steps replayed"


def test_insisting_on_graphs_beside_a_hook_is_an_error(pretended):
    engine = make(cuda_graphs=True)
    with engine.module.blocks[0].register_forward_pre_hook(lambda *args: None):
        for use in (lambda: engine.generate(IDS, MASK, **QUIET), lambda: engine.stream([5])):
            with pytest.raises(ConfigError, match=r"cannot use any: they would leave out a hook on blocks\.0"):
                use()
    engine.generate(IDS, MASK, **QUIET)
    assert engine.generate_many(PROMPTS, **GREEDY)


def test_without_a_cache_there_is_nothing_to_replay(pretended):
    """Who asks for that knows what it costs, so it is no error either."""
    engine = make(cuda_graphs=True)
    engine.generate(IDS, MASK, **QUIET, use_cache=False)
    assert road(engine) == "without: without a cache (use_cache) every step computes whole texts"
    assert not pretended.sizes
