"""Graphs that stay from call to call, while weights change under them and caches come and go."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from headrace.workers.inference import init_inference
from headrace.workers.inference.home import Home, Size
from headrace.workers.inference.shell import CACHE_NAME
from tests.inference.batches import generated_at_once, padded
from tests.inference.test_graphs import GREEDY, IDS, MASK, PROMPTS, QUIET, at_each_step, make, replays
from tests.support.tiny_models import make_model

# -------------------------------------------------------------------------------------------------- weights that change


def test_weights_changed_in_place_are_read_where_they_are(pretended):
    engine, other = make(), init_inference(make_model("llama", seed=8), device="cpu", cuda_graphs=False)
    before = engine.generate(IDS, MASK, **QUIET)
    engine.module.load_state_dict(other.module.state_dict())
    after = engine.generate(IDS, MASK, **QUIET)
    assert torch.equal(after, other.generate(IDS, MASK, **QUIET))
    assert not torch.equal(after, before)
    assert pretended.sizes == [4]


@pytest.mark.parametrize("call", ["generate", "streams"])
def test_weights_that_others_took_the_place_of_are_captured_again(pretended, call):
    engine = make()

    def use():
        if call == "streams":
            engine.generate_many(PROMPTS[:1], **GREEDY)
        else:
            engine.generate(IDS[:1], MASK[:1], **QUIET)

    use()
    use()
    norm = engine.module.final_norm
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)
    use()
    assert pretended.sizes == [1, 1]
    engine.module.blocks[0] = copy.copy(engine.module.blocks[0])
    use()
    assert pretended.sizes == [1, 1, 1]
    gc.collect()
    assert len(pretended.alive) == 1


def test_a_cache_that_is_kept_meets_the_new_weights(pretended):
    """Also if nothing was generated since: graphs of the old ones are not used any more."""
    engine, plain = make(), make(cuda_graphs=False)
    logits = []
    for one in (engine, plain):
        out = one.generate(IDS, MASK, **QUIET, return_dict_in_generate=True)
        norm = one.module.final_norm
        norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)
        mask = torch.cat((MASK, torch.ones(3, 6, dtype=MASK.dtype)), 1)
        logits.append(one(out.sequences[:, -1:], mask, past_key_values=getattr(out, CACHE_NAME)).logits)
    torch.testing.assert_close(*logits)
    assert replays(engine) == 5


def test_what_follows_from_weights_follows_their_changes(monkeypatch):
    """Kernels take the norms of GPT-2 after the product, by sums that were computed when it was loaded."""
    monkeypatch.setattr("headrace.kernels.weight.pack_weight", lambda weight: weight)  # what is packed has none
    engine = init_inference(make_model("gpt2"), device="cpu")
    linear, norm = engine.module.blocks[0].qkv, engine.module.blocks[0].attention_norm
    folded, before = linear._folded, linear._folded.clone()
    with torch.no_grad():
        norm.bias.normal_()
    engine(IDS)
    assert linear._folded is folded
    assert not torch.equal(folded, before)
    torch.testing.assert_close(folded[1], linear.weight.float() @ norm.bias.float())


# --------------------------------------------------------------------------------------------------- caches and threads


def test_a_cache_that_is_kept_makes_room_for_the_next(pair, pretended):
    """It goes on where it was, whatever came between."""
    engine, plain = make(), make(cuda_graphs=False)
    texts = []
    for one in (engine, plain):
        out = one.generate(IDS, MASK, **QUIET, return_dict_in_generate=True)
        cache = getattr(out, CACHE_NAME)
        one.generate(IDS.flip(0), MASK.flip(0), **QUIET)
        mask = torch.cat((MASK, torch.ones(3, 6, dtype=MASK.dtype)), 1)
        copied = copy.deepcopy(cache)
        for held in (cache, copied):
            held.validate()
            texts.append(one.generate(out.sequences, mask, past_key_values=held, **QUIET))
            held.validate()
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert replays(engine) == 4 * 5 + 2  # the prompts of those that go on are a single token
    assert cache.home is None


def test_an_empty_cache_may_be_given(pretended):
    engine = make()
    cache = engine.new_cache()
    expected = make(cuda_graphs=False).generate(IDS, MASK, **QUIET)
    assert torch.equal(engine.generate(IDS, MASK, past_key_values=cache, **QUIET), expected)
    assert replays(engine) == 5
    # And by hand, from the same cache.
    mask = torch.cat((MASK, torch.ones(3, 6, dtype=MASK.dtype)), 1)
    engine(expected[:, -1:], mask, past_key_values=cache)
    assert replays(engine) == 6


def test_results_are_not_overwritten_by_the_next_step(pretended):
    engine = make()
    settings = QUIET | {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    got, expected = engine.generate(IDS, MASK, **settings), make(cuda_graphs=False).generate(IDS, MASK, **settings)
    for name in ("logits", "scores"):
        torch.testing.assert_close(torch.stack(getattr(got, name)), torch.stack(getattr(expected, name)))


def test_a_text_within_a_text(pretended):
    """One that begins while another is generated moves that one out; both end as they would."""
    engine, inner = make(), []
    expected = engine.generate(IDS, MASK, **QUIET)
    alone = engine.generate(IDS[:1], MASK[:1], **QUIET)

    def act(step):
        if step == 3:
            inner.append(engine.generate(IDS[:1], MASK[:1], **QUIET))

    assert torch.equal(engine.generate(IDS, MASK, **QUIET, logits_processor=at_each_step(act)), expected)
    assert torch.equal(inner[0], alone)


def test_from_several_threads(pretended):
    engine = make()
    batches = [padded(lens, seed=seed) for seed, lens in enumerate(([7], [3, 12], [30, 1, 2, 8]))]
    found = generated_at_once(engine, batches, 5, QUIET)
    for batch, each in zip(batches, found, strict=True):
        expected = make(cuda_graphs=False).generate(*batch, **QUIET)
        assert all(torch.equal(text, expected) for text in each)
    assert replays(engine)


@pytest.mark.parametrize(
    ("size", "other", "fits", "both"),
    [
        (Size.of(3, 40), Size.of(3, 40), True, Size(3, 40, 9)),
        (Size.of(3, 40), Size.of(4, 16), False, Size(4, 40, 9)),
        (Size.of(3, 40), Size.of(1, 41), False, Size(3, 41, 9)),
        (Size.of(1, 200), Size.of(2, 10, 150), False, Size(2, 200, 22)),
        (Size.of(8, 200, 30), Size.of(2, 10, 150), True, Size(8, 200, 120)),
    ],
)
def test_sizes(size, other, fits, both):
    """In blocks of 16; sources have blocks of their own."""
    assert size.holds(other) == fits
    assert size.with_room_for(other) == both


def test_where_a_large_home_has_no_room_a_small_one_may(pretended, monkeypatch):
    sizes = []

    class Small(Home):
        def __init__(self, model, size):
            sizes.append(size)
            if size.blocks > 6:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            super().__init__(model, size)

    monkeypatch.setattr("headrace.workers.inference.replays.Home", Small)
    engine = make()
    engine.generate(IDS, MASK, **QUIET)
    assert sizes == [Size(8, 256, 6 * 256 // 17 + 3), Size(3, 17, 6)]
    assert replays(engine) == 5
    engine.generate(*padded([4] * 9), **QUIET)
    assert replays(engine) == 5
    assert engine.report().graphs["generate"].startswith("without: there is no memory for them (CUDA out of memory)")
