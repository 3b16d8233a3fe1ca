"""Sizing the cache of a GPU, on a CPU that claims to be one: refused before loading, measured by a dry run."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from headrace.errors import ConfigError, ModelError
from headrace.kernels.kv import KVCache
from headrace.kernels.quantize import SCHEMES
from headrace.workers import engines, kv_size
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.config import EngineConfig
from headrace.workers.describe import describe
from headrace.workers.encoder_graphs import sizes_of_batches
from headrace.workers.engine import Engine
from headrace.workers.estimate import estimated
from headrace.workers.fits import check_fits
from headrace.workers.graph_memory import GraphMemory
from headrace.workers.loader import load_model
from headrace.workers.memory import GpuMemory
from headrace.workers.served import start_token_of
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import save_model, save_t5

GPU = torch.device("cuda", 0)
MIB = 1 << 20


class Gpu:
    """A GPU's memory: `held` by others, `peak` while steps run, all of it within `total`."""

    def __init__(self, total, *, held=0, peak=0, capability=(9, 0)):
        self.total, self.held, self.peak, self.capability = total, held, peak, capability

    def __call__(self, device, utilization):
        return GpuMemory(total=self.total, held=self.held, utilization=utilization)


@pytest.fixture
def gpu(monkeypatch):
    """Lets a CPU pass for a GPU of that kind."""

    def pretend(total, **settings):
        memory = Gpu(total, **settings)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: memory.capability)
        monkeypatch.setattr(kv_size, "gpu_memory", memory)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        return memory

    return pretend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    checkpoint = Checkpoint(folder)
    return load_model(checkpoint), describe(checkpoint)[0]


def sized(loaded, memory, **settings):
    return divided(loaded, memory, **settings).config


def divided(loaded, memory, **settings):
    model, card = loaded
    start = start_token_of(model.spec, card, None) if model.spec.encoder is not None else None
    config = EngineConfig(**{"max_num_seqs": 4, "max_batch_tokens": 100} | settings)
    return kv_size.with_measured_cache(model, card, config, memory, start_token=start)


# --------------------------------------------------------------------------------------------------- before loading


def test_the_weights_are_known_before_they_are_read(folder, loaded):
    checkpoint = Checkpoint(folder)
    spec, card = checkpoint.spec, describe(checkpoint)[0]
    for dtype in (torch.float32, torch.bfloat16):
        needs = estimated(spec, card, EngineConfig(), dtype)
        assert needs.weights == sum(p.numel() for p in load_model(folder).parameters()) * dtype.itemsize


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("name", ["llama", "t5", "falcon-40b", "mixtral"])
def test_weights_in_8_bits_are_known_with_their_factors(tmp_path, name, scheme):
    (save_t5 if name == "t5" else save_model)(tmp_path, name)
    checkpoint = Checkpoint(tmp_path)
    spec, card = checkpoint.spec, describe(checkpoint)[0]
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(tmp_path, dtype=str(dtype).removeprefix("torch."), scheme=SCHEMES[scheme])
        taken = sum(w.numel() * w.element_size() for w in (*model.parameters(), *model.scales().values()))
        # Packed for a CPU a tied head is a copy of the embedding.
        taken -= model.embedding.weight.nbytes if spec.head.tied else 0
        plain = estimated(spec, card, EngineConfig(), dtype)
        quantized = estimated(spec, card, EngineConfig(quantize=scheme), dtype)
        assert quantized.weights == taken
        assert plain.weights - plain.saved_by[scheme] == taken
        assert not quantized.saved_by


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_8_bits_are_advised_where_they_would_fit(folder, gpu, scheme):
    checkpoint = Checkpoint(folder)
    spec, card = checkpoint.spec, describe(checkpoint)[0]
    config = EngineConfig(cuda_graphs=False)
    needs = estimated(spec, card, config, torch.float32)
    least, saved = needs.fixed + needs.cache(512), needs.saved_by[scheme]
    gpu(int((least - saved // 2) / 0.9))
    advised = rf"What helps: .*--quantize {scheme}, with which the weights take 0\.00 GiB"
    with pytest.raises(ModelError, match=advised):
        kv_size.check_before_loading(spec, card, config, torch.float32, GPU)
    assert kv_size.check_before_loading(spec, card, dataclasses.replace(config, quantize=scheme), torch.float32, GPU), (
        "it was advised, and does not fit either"
    )
    gpu(int((least - 2 * saved) / 0.9))
    with pytest.raises(ModelError, match="What helps") as caught:
        kv_size.check_before_loading(spec, card, config, torch.float32, GPU)
    assert "--quantize" not in caught.value.message


def test_a_gpu_without_fp8_is_not_advised_to_take_it(folder, gpu):
    checkpoint = Checkpoint(folder)
    spec, card = checkpoint.spec, describe(checkpoint)[0]
    config = EngineConfig(cuda_graphs=False)
    needs = estimated(spec, card, config, torch.float32)
    total = int((needs.fixed + needs.cache(512) - needs.saved_by["fp8"] // 2) / 0.9)
    for capability, advised in (((8, 0), False), ((8, 9), True)):
        gpu(total, capability=capability)
        with pytest.raises(ModelError, match="--quantize int8") as caught:
            kv_size.check_before_loading(spec, card, config, torch.float32, GPU)
        assert ("--quantize fp8" in caught.value.message) is advised


def test_what_is_advised_for_steps_fits(folder, gpu):
    checkpoint = Checkpoint(folder)
    spec, card = checkpoint.spec, describe(checkpoint)[0]
    config = EngineConfig(quantize="int8")
    needs = estimated(spec, card, config, torch.float32)
    for saved, words, changes in (
        (needs.saved_by_quarter, "a quarter of", {"max_batch_tokens": 512, "max_num_seqs": 16}),
        (needs.graphs, "--enforce-eager", {"cuda_graphs": False}),
    ):
        gpu(-(-(needs.fixed + needs.cache(512) - saved) * 10 // 9) + 10)
        with pytest.raises(ModelError, match=f"What helps: .*{words}"):
            kv_size.check_before_loading(spec, card, config, torch.float32, GPU)
        assert kv_size.check_before_loading(spec, card, dataclasses.replace(config, **changes), torch.float32, GPU)


def encoder(folder, **settings):
    save_encoder(folder)
    checkpoint = Checkpoint(folder)
    return checkpoint.spec, describe(checkpoint)[0], EngineConfig(**{"max_batch_tokens": 300} | settings)


def test_graphs_of_encoders_are_counted(tmp_path):
    """By hand: a graph for each size, of which the states of tokens and texts stay, and a description."""
    spec, card, config = encoder(tmp_path, max_num_seqs=4, max_batch_tokens=40)
    assert card.max_model_len == 40
    kept = sum(spec.hidden_size * (tokens * 2 + 2 * (texts + 1) * 4) for tokens in (16, 32, 40) for texts in (1, 4))
    needs = estimated(spec, card, config, torch.bfloat16)
    assert needs.graphs == kept + 6 * 16 * MIB
    assert needs.block == 0
    assert estimated(spec, card, dataclasses.replace(config, cuda_graphs=False), torch.bfloat16).graphs == 0


def test_they_are_those_that_an_encoder_captures(tmp_path):
    spec, card, config = encoder(tmp_path, max_num_seqs=20, device="cpu")
    runner = engines.load_engine(tmp_path, config)._runner
    sizes = sizes_of_batches(runner._max_tokens, runner._max_texts)
    assert estimated(spec, card, config, torch.float32).graphs // (16 * MIB) == len(sizes)


def test_an_encoder_is_refused_for_its_graphs(tmp_path, gpu):
    spec, card, config = encoder(tmp_path)
    needs = estimated(spec, card, config, torch.float32)
    gpu(int((needs.fixed - MIB) / 0.9))
    with pytest.raises(ModelError, match=r"the largest step .* \+ CUDA graphs .* --enforce-eager") as caught:
        kv_size.check_before_loading(spec, card, config, torch.float32, GPU)
    assert "KV cache" not in caught.value.message
    eager = dataclasses.replace(config, cuda_graphs=False)
    assert kv_size.check_before_loading(spec, card, eager, torch.float32, GPU)


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(folder, gpu, monkeypatch):
    gpu(1 * MIB)
    monkeypatch.setattr(engines, "pick_device", lambda wanted: GPU)
    monkeypatch.setattr(engines, "loading", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(ModelError, match=r"does not fit on the GPU: weights .* = .* GiB, but 0\.00 GiB"):
        engines.load_engine(folder, EngineConfig())


@pytest.mark.parametrize("setting", ["kv_tokens", "max_model_len"])
def test_a_setting_that_asks_for_too_much_is_named(folder, gpu, monkeypatch, setting):
    checkpoint = Checkpoint(folder)
    spec, card = checkpoint.spec, describe(checkpoint)[0]
    needs = estimated(spec, card, EngineConfig(cuda_graphs=False), torch.float32)
    gpu(int((needs.fixed + needs.cache(300)) / 0.9))
    config = EngineConfig(**{setting: 512}, cuda_graphs=False)
    monkeypatch.setitem(check_fits.__kwdefaults__, "least", 16)
    with pytest.raises(ConfigError, match=f"--{setting.replace('_', '-')} 288 or less") as caught:
        kv_size.check_before_loading(spec, card, config, torch.float32, GPU)
    assert caught.value.param == setting


def test_on_a_cpu_nothing_is_checked_and_nothing_measured(loaded):
    model, card = loaded
    assert kv_size.check_before_loading(model.spec, card, EngineConfig(), torch.float32, torch.device("cpu")) is None
    unmeasured = divided(loaded, None)
    assert unmeasured.config == EngineConfig(max_num_seqs=4, max_batch_tokens=100)
    assert unmeasured.graphs is None


# ------------------------------------------------------------------------------------------------------- the dry run


def test_the_cache_takes_what_weights_and_steps_leave(loaded, gpu):
    model, _ = loaded
    block = KVCache.bytes_per_block(model.spec, 16, torch.float32)
    memory = gpu(1000 * MIB, held=100 * MIB)
    before = memory(GPU, 0.8)
    memory.held += 200 * MIB  # the weights came
    cache = 2 * 4 * (-(-27 // 16) + 1) + 2  # blocks of the dry run: four texts of 25 tokens and two more
    memory.peak = 50 * MIB + cache * block
    config = sized(loaded, before, cuda_graphs=False)
    assert config.kv_tokens == 4 * 512  # no more is of use
    assert config.cuda_graphs is False
    memory.peak = int(599 * MIB / 1.05) + cache * block
    config = sized(loaded, before, cuda_graphs=False)
    assert config.kv_tokens < 4 * 512
    used = 200 * MIB + 599 * MIB + (config.kv_tokens // 16 + 2) * block
    assert 800 * MIB - 2 * block < used <= 800 * MIB


def test_what_is_kept_for_graphs_is_known(loaded, gpu):
    """A workspace, logits and descriptions of four graphs, and what no cache can use."""
    model, _ = loaded
    memory = gpu(2000 * MIB)
    before = memory(GPU, 0.9)
    memory.peak = 50 * MIB
    graphs = divided(loaded, before, max_batch_tokens=16).graphs
    rows = 1 + 2 + 4 + 4
    results = 4 * 16 * MIB + rows * model.spec.vocab_size * 4
    assert 45 * MIB < graphs.kept - results < 52.5 * MIB  # the workspace, without the cache of the dry run
    assert 1000 * MIB < graphs.spare < 1800 * MIB - graphs.kept
    assert divided(loaded, before, cuda_graphs=False).graphs is None
    small = gpu(200 * MIB)
    beside = divided(loaded, small(GPU, 0.9), kv_tokens=160, max_batch_tokens=16).graphs
    assert isinstance(beside, GraphMemory)
    assert 4 * 16 * MIB < beside.kept < 4 * 16 * MIB + 2 * MIB
    assert 180 * MIB - beside.kept - 2 * MIB < beside.spare < 180 * MIB - beside.kept


def test_the_dry_run_leaves_nothing_behind(loaded, gpu, monkeypatch):
    """Its cache would be counted as in use, if it waited for the collector."""
    gpu(10_000 * MIB)
    caches = []
    make = KVCache.__init__
    monkeypatch.setattr(
        KVCache, "__init__", lambda cache, *args: (caches.append(weakref.ref(cache)), make(cache, *args))[1]
    )
    gc.disable()
    try:
        sized(loaded, GpuMemory(total=10_000 * MIB, held=0, utilization=0.9))
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_steps_are_compiled_before_they_are_measured(loaded, gpu, monkeypatch):
    gpu(10_000 * MIB)
    events = []

    def compile_ahead(engine, compute):
        compute()
        assert not engine.has_work
        events.append(f"compiled {engine.steps > 2}")

    monkeypatch.setattr(Engine, "compile_ahead", compile_ahead)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("measured"))
    sized(loaded, GpuMemory(total=10_000 * MIB, held=0, utilization=0.9))
    assert events == ["compiled True", "measured", "measured"]


def test_what_steps_take_can_make_it_too_much(loaded, gpu):
    memory = gpu(100 * MIB)
    before = memory(GPU, 0.9)
    memory.held, memory.peak = 10 * MIB, 90 * MIB
    with pytest.raises(ModelError, match="the largest step"):
        sized(loaded, before, cuda_graphs=False)


def test_a_step_for_which_there_is_no_memory_is_said_to_be_too_large(loaded, gpu, monkeypatch):
    gpu(1000 * MIB)

    def fail(engine, now):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB.\nMore about it.")

    monkeypatch.setattr(Engine, "step", fail)
    with pytest.raises(ModelError, match=r"Tried to allocate 5 GiB\. Lower --max-num-batched-tokens"):
        sized(loaded, GpuMemory(total=1000 * MIB, held=0, utilization=0.9))


def test_settings_of_a_person_decide(loaded, gpu):
    gpu(1000 * MIB)
    assert sized(loaded, GpuMemory(total=0, held=0, utilization=0.9), kv_tokens=160).kv_tokens == 160


@pytest.mark.parametrize("settings", [{}, {"max_model_len": 3}, {"max_model_len": 2}, {"max_num_seqs": 1}])
def test_the_dry_run_computes_the_largest_steps(loaded, gpu, monkeypatch, settings):
    plans = plans_of(monkeypatch)
    gpu(10_000 * MIB)
    sized(loaded, GpuMemory(total=10_000 * MIB, held=0, utilization=0.9), **settings)
    if settings.get("max_model_len") == 2:
        assert not plans
    elif "max_model_len" not in settings:
        rows = settings.get("max_num_seqs", 4)
        assert (100, rows) in plans  # the whole budget, and every row samples
        assert (rows, rows) in plans


@pytest.mark.parametrize("variant", ["t5", "t5-v1.1"])
def test_encoder_decoders_run_dry_too(tmp_path, gpu, monkeypatch, variant):
    plans = plans_of(monkeypatch)
    save_t5(tmp_path, variant)
    checkpoint = Checkpoint(tmp_path)
    gpu(10_000 * MIB)
    loaded = load_model(checkpoint), describe(checkpoint)[0]
    config = sized(loaded, GpuMemory(total=10_000 * MIB, held=0, utilization=0.9))
    assert config.kv_tokens > 0
    assert max(tokens for tokens, _ in plans) > 400  # a source of nearly all that there may be, in one piece


def plans_of(monkeypatch):
    """(tokens, sampled rows) of every step that is computed from now on."""
    plans = []
    make = Engine.__init__

    def watched(engine, *args, **kwargs):
        make(engine, *args, **kwargs)
        schedule = engine._scheduler.schedule

        def noted():
            plan = schedule()
            if plan.chunks:
                plans.append((plan.num_tokens, sum(chunk.samples for chunk in plan.chunks)))
            return plan

        engine._scheduler.schedule = noted

    monkeypatch.setattr(Engine, "__init__", watched)
    return plans
