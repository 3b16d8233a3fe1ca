"""Whole texts as CUDA graphs, of encoders and of sources: what comes of them is what comes without.

On a CPU they are pretended; on a GPU they are there.
"""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel

from headrace.errors import ConfigError
from headrace.workers.inference import init_inference
from tests.inference.batches import padded
from tests.support.gpu_memory import check_that_nothing_stays
from tests.support.graphs_on_cpu import Pretended
from tests.support.tiny_encoders import ENCODERS, TASKS, make_any
from tests.support.tiny_models import make_t5

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")
NOT_PERMITTED = RuntimeError("CUDA error: operation not permitted when stream is capturing\nMore lines.")


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
    else:
        request.getfixturevalue("pretended")
    return request.param


def make(name="bert", device="cpu", **settings):
    return init_inference(make_any(name), device=device, **settings)


def pair_of(module, device, **settings):
    """Engines of the same weights: without graphs, and with."""
    plain = init_inference(copy.deepcopy(module), device=device, cuda_graphs=False, **settings)
    return plain, init_inference(module, device=device, cuda_graphs=True, **settings)


def batch(lens, device="cpu", side="right", **types):
    """Arguments of a call; token types are below `types`, if there are some."""
    ids, mask = padded(lens, side=side, vocab=99)
    given = {"input_ids": (ids + 2).masked_fill(mask == 0, 1), "attention_mask": mask}
    if types:
        given["token_type_ids"] = torch.arange(ids.shape[1]).expand(ids.shape) % types["types"]
    return {name: values.to(device) for name, values in given.items()}


def assert_same(got, expected):
    """The same in float32, but for how products of more rows add up."""
    assert list(got.keys()) == list(expected.keys())
    for one, other in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def road(engine):
    return engine.report().graphs["texts"]


def replays(engine):
    return engine._kind.text_replays.num_replays


def batches_of(engine, device):
    """One text, and few and many, which have graphs of their own; each twice, among others of other sizes."""
    kinds = engine._kind.loaded.config.type_vocab_size
    return 2 * [
        batch(lens, device, side, **types)
        for lens in ([9], [11, 3, 1, 38], [2] * 12)
        for side in ("left", "right")
        for types in ({"types": kinds}, {})
    ]


@pytest.mark.parametrize("name", ENCODERS)
def test_texts_are_those_without(device, name):
    plain, engine = pair_of(make_any(name), device)
    batches = batches_of(engine, device)
    found = [engine(**one) for one in batches]
    for got, one in zip(found, batches, strict=True):  # none was overwritten by a later one
        assert_same(got, plain(**one))
    assert road(engine) == "3 captured, 24 steps replayed"
    assert road(plain) == "without: cuda_graphs is False"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_in_16_bits_they_are_as_good_as_those_without(device, name, dtype):
    """A graph has more rows, for which other kernels round elsewhere; the float32 of both is the judge."""
    module = make_any(name)
    exact = init_inference(copy.deepcopy(module), device=device, cuda_graphs=False)
    plain, engine = pair_of(module, device, dtype=dtype)
    errors = {plain: 0.0, engine: 0.0}
    for given in batches_of(engine, device):
        right = exact(**given).to_tuple()
        for one in errors:
            for got, expected in zip(one(**given).to_tuple(), right, strict=True):
                errors[one] += float((got.float() - expected).abs().mean() / expected.abs().mean())
    assert 0 < errors[engine] < 1.25 * errors[plain]
    assert replays(engine) == 24


@pytest.mark.parametrize("name", TASKS)
def test_heads_of_tasks_get_the_same_states(device, name):
    plain, engine = pair_of(make_any(name), device)
    given = batch([11, 3, 1, 38], device)
    if "MultipleChoice" in name:
        given = {key: torch.stack((values, values.flip(0)), 1) for key, values in given.items()}
    assert_same(engine(**given), plain(**given))
    assert replays(engine) == 1


def test_the_encoder_of_t5_alone(device):
    config = make_t5("t5").config
    torch.manual_seed(0)
    plain, engine = pair_of(T5EncoderModel(config).eval(), device)
    for lens in ([11, 3], [70, 2, 9], [5]):
        given = batch(lens, device)
        assert_same(engine(**given), plain(**given))
    assert replays(engine) == 3


def test_sources_are_read_by_graphs_too(device):
    plain, engine = pair_of(make_t5("t5"), device)
    for lens in ([11, 3], [30, 2, 9]):
        given = batch(lens, device)
        texts = [one.generate(**given, max_new_tokens=8, do_sample=False) for one in (plain, engine)]
        assert torch.equal(*texts)
        starts = torch.zeros(len(lens), 1, dtype=torch.int64, device=device)
        logits = [one(**given, decoder_input_ids=starts).logits for one in (plain, engine)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert replays(engine) == 4
    assert engine.report().graphs["generate"].endswith(" 16 steps replayed")


def test_as_the_kernels_compute_it(monkeypatch):
    """They know how long texts are from the device alone."""
    pytest.importorskip("triton")
    Pretended(monkeypatch, interpreted=True)
    plain, engine = pair_of(make_any("bert-pooled"), "cpu")
    given = batch([7, 2], types=3)
    assert_same(engine(**given), plain(**given))
    assert replays(engine) == 1


def test_they_are_captured_when_first_needed_and_kept(pretended):
    engine = make()
    assert road(engine) == "captured when first needed"
    assert "texts captured when first needed" in str(engine.report())
    for lens in ([5], [16], [3, 2], [9, 8], [17], [5]):
        engine(**batch(lens))
    # Tokens and texts; another that is as large has its own.
    assert pretended.sizes == [(16, 1), (16, 8), (32, 8), (32, 1)]
    assert road(engine) == "4 captured, 6 steps replayed"


@pytest.mark.parametrize("rows", [257, 60])
def test_what_is_too_large_for_any_is_computed_without(pretended, rows):
    """Which is no error: its products take longer than its launches."""
    plain, engine = pair_of(make_any("bert"), "cpu")
    given = batch([1 if rows == 257 else 38] * rows)
    assert_same(engine(**given), plain(**given))
    assert not pretended.sizes
    engine(**batch([38] * 53))
    assert pretended.sizes == [(2048, 256)]


def test_hooks_are_called_and_graphs_come_back(pretended):
    engine, insisting, calls = make(), make(cuda_graphs=True), []
    given = batch([5, 3])
    expected = engine(**given)
    with engine.module.blocks[1].register_forward_hook(lambda *args: calls.append(1)):
        assert_same(engine(**given), expected)
        assert road(engine) == "without: they would leave out a hook on blocks.1"
    assert len(calls) == 1
    with (
        insisting.module.blocks[0].register_forward_pre_hook(lambda *args: None),
        pytest.raises(ConfigError, match=r"cannot use any: they would leave out a hook on blocks\.0"),
    ):
        insisting(**given)
    assert_same(engine(**given), expected)
    assert replays(engine) == 2


def test_weights_that_change_under_them(device):
    plain, engine = pair_of(make_any("bert"), device)
    given = batch([5, 3], device)
    before = engine(**given).logits
    other = make(device=device)
    with torch.no_grad():
        for weight in other.module.parameters():
            weight.mul_(1.5)
    for one in (plain, engine):
        one.module.load_state_dict(other.module.state_dict())  # in place
    assert_same(engine(**given), plain(**given))
    assert not torch.allclose(engine(**given).logits, before)
    for one in (plain, engine):
        norm = one.module.blocks[0].mlp_norm
        norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)  # another in its place
    assert_same(engine(**given), plain(**given))
    assert road(engine) == "1 captured, 4 steps replayed"


def test_only_the_last_graphs_are_kept(pretended):
    engine = make()
    engine(**batch([5, 3]))
    engine.module.blocks[0] = copy.copy(engine.module.blocks[0])
    engine(**batch([5, 3]))
    assert pretended.sizes == [(16, 8)] * 2
    gc.collect()
    assert len(pretended.alive) == 1
    engine.destroy()
    gc.collect()
    assert not pretended.alive


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OUT_OF_MEMORY, "there is no memory for them (CUDA out of memory. Tried to allocate 2 GiB); lower max_tokens"),
        (NOT_PERMITTED, "the model cannot be captured (CUDA error: operation not permitted when stream is capturing)"),
    ],
)
def test_what_cannot_be_captured_is_computed_without(pretended, error, why):
    (plain, insisting), engine, given = pair_of(make_any("bert"), "cpu"), make(), batch([5, 3])
    pretended.error = error
    assert_same(engine(**given), plain(**given))
    assert road(engine) == f"without: {why}"
    with pytest.raises(ConfigError) as caught:
        insisting(**given)
    assert caught.value.param == "cuda_graphs"
    assert f"this call cannot use any: {why}" in str(caught.value)
    # Memory comes back; what cannot be captured is not tried again and again.
    pretended.error = None
    engine(**given)
    assert bool(pretended.sizes) == (error is OUT_OF_MEMORY)


def test_several_threads(device):
    """Whose batches are copied to the same place, one after the other."""
    plain, engine = pair_of(make_any("bert"), device)
    batches = [batch(lens, device) for lens in ([7], [11, 30], [3] * 5, [9, 4], [38] * 3)]

    def use(given):
        if device == "cpu":
            return [engine(**given) for _ in range(10)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            found = [engine(**given) for _ in range(10)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(len(batches)) as pool:
        for given, found in zip(batches, pool.map(use, batches), strict=True):
            for one in found:
                assert_same(one, plain(**given))
    assert replays(engine) == 50


def test_in_inference_mode_and_out_of_it(device):
    """What is made in that mode can be written to there alone."""
    plain, engine = pair_of(make_any("bert"), device)
    for given in (batch([9, 4], device), batch([9, 4, 20], device)):
        with torch.inference_mode():
            assert_same(engine(**given), plain(**given))
        logits = engine(**given).logits
        assert_same(engine(**given), plain(**given))
        logits += 1  # is the caller's, who may write to it
    assert replays(engine) == 6


@pytest.mark.gpu
def test_their_memory_is_free_after_destroy():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")

    def use():
        engine = init_inference(make_any("bert", hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        engine(**batch([30] * 8, "cuda"))
        assert replays(engine) == 1
        engine.destroy()

    check_that_nothing_stays(use)
