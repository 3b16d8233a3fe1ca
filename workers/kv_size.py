"""How large the KV cache of a GPU's engine gets: refused before the weights are read, or measured once they are there.

The measurement is a dry run: an engine with a small cache computes the largest steps that the settings allow. What
they took is right whatever kernels and samplers do, which no formula is for long; and it costs little, for the kernels
that it compiles are those that serve.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch

from headrace.card import ModelCard
from headrace.errors import ModelError
from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from headrace.kernels.spec import ModelSpec
from headrace.workers.config import EngineConfig
from headrace.workers.device import gpu_memory
from headrace.workers.dry_run import DryRun
from headrace.workers.engine import Engine
from headrace.workers.estimate import estimated, estimated_graphs, quartered, saved_by
from headrace.workers.fits import check_fits
from headrace.workers.graph_memory import GraphMemory
from headrace.workers.memory import LEAST_TOKENS, GpuMemory, Needs, kv_blocks
from headrace.workers.served import model_len

__all__ = ["Sized", "check_before_loading", "expected_len", "graph_memory", "with_measured_cache"]

_MARGIN = 1.05  # of what was measured: memory is handed out in pieces
_CERTAIN = 1.5  # longest texts for which there must seem to be room, so that there is for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """An engine's share of a GPU, divided.

    Attributes:
        config: its settings, with the size of the KV cache.
        graphs: what is kept for its graphs; None if it has none.
    """

    config: EngineConfig
    graphs: GraphMemory | None


def check_before_loading(
    spec: ModelSpec, card: ModelCard, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> GpuMemory | None:
    """Refuse a model that cannot fit; what there is of the GPU's memory, None for a CPU.

    Raises:
        ConfigError: a setting asks for too much.
        ModelError: it does not fit at all.
    """
    if device.type != "cuda":
        return None
    memory = gpu_memory(device, config.gpu_memory_utilization)
    tokens, asked = _least_cache(card, config)
    needs = estimated(spec, card, config, dtype, device)
    check_fits(memory, needs, name=card.name, tokens=tokens, dtype=card.dtype, asked=asked)
    return memory


def expected_len(card: ModelCard, config: EngineConfig, memory: GpuMemory, needs: Needs) -> int | None:
    """Most tokens of a text that the cache will allow, as far as that can be told before it is measured; or None."""
    length = model_len(card, config)
    if config.kv_tokens is not None:
        return min(length, config.kv_tokens // config.block_size * config.block_size)
    blocks = kv_blocks(memory, needs, max_model_len=length, max_num_seqs=config.max_num_seqs)
    return length if blocks * config.block_size >= min(_CERTAIN, config.max_num_seqs) * length else None


def with_measured_cache(
    model: Model,
    card: ModelCard,
    config: EngineConfig,
    memory: GpuMemory | None,
    *,
    start_token: int | None,
    compiled: bool = False,
) -> Sized:
    """The settings with the size of the KV cache, where neither they nor a CPU's defaults say it; and what that leaves
    for graphs.

    Args:
        model: with its weights, on the GPU.
        card: of it.
        config: of the engine.
        memory: of the GPU before the weights came.
        start_token: of an encoder-decoder.
        compiled: whether all that the measurement launches is compiled already.

    Raises:
        ConfigError: a setting asks for too much.
        ModelError: it does not fit at all.
    """
    if memory is None or config.kv_tokens is not None:
        return Sized(config=config, graphs=graph_memory(model, card, config, memory))
    length = model_len(card, config)
    model.reserve_positions(length)
    device, dtype = _device_and_dtype(model)
    try:
        largest = _dry_run(model, card, config, device, start_token, compiled)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{card.name} fits on the GPU, but the largest step that the settings allow does not: "
            f"{str(error).partition(chr(10))[0]} Lower --max-num-batched-tokens or --max-num-seqs.",
            param="max_num_batched_tokens",
        ) from error
    now = gpu_memory(device, config.gpu_memory_utilization)
    workspace = int(largest * _MARGIN)
    graphs = _graphs(model, config, workspace)
    needs = Needs(
        weights=max(0, now.held - memory.held),  # and tables, and the code of kernels
        workspace=workspace,
        graphs=graphs,
        block=KVCache.bytes_per_block(model.spec, config.block_size, dtype),
        block_size=config.block_size,
        saved_by=saved_by(model, device),
        saved_by_quarter=workspace + graphs - workspace // 4 - _graphs(model, quartered(config), workspace // 4),
    )
    tokens, asked = _least_cache(card, config)
    check_fits(memory, needs, name=card.name, tokens=tokens, dtype=card.dtype, asked=asked)
    blocks = kv_blocks(memory, needs, max_model_len=length, max_num_seqs=config.max_num_seqs)
    config = dataclasses.replace(config, kv_tokens=blocks * config.block_size)
    return Sized(config=config, graphs=GraphMemory.of(memory, needs, blocks * config.block_size) if graphs else None)


def graph_memory(model: Model, card: ModelCard, config: EngineConfig, memory: GpuMemory | None) -> GraphMemory | None:
    """What is kept for graphs where nothing is measured: for an encoder, or beside a cache of a given size."""
    if memory is None or not config.cuda_graphs:
        return None
    device, dtype = _device_and_dtype(model)
    needs = estimated(model.spec, card, config, dtype, device)
    # A refusal counts what is certain. But they need a workspace, too.
    needs = dataclasses.replace(needs, graphs=needs.graphs + needs.workspace)
    return GraphMemory.of(memory, needs, config.kv_tokens or 0)


def _device_and_dtype(model: Model) -> tuple[torch.device, torch.dtype]:
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    assert isinstance(device, torch.device)
    assert isinstance(dtype, torch.dtype)
    return device, dtype


def _graphs(model: Model, config: EngineConfig, step: int) -> int:
    _, dtype = _device_and_dtype(model)
    return estimated_graphs(model.spec, config, dtype, tokens=config.max_batch_tokens, step=step)


def _least_cache(card: ModelCard, config: EngineConfig) -> tuple[int, str | None]:
    """Tokens that the cache must hold, and the setting that says so."""
    if config.kv_tokens is not None:
        return config.kv_tokens, "kv_tokens"
    if config.max_model_len is not None:
        return config.max_model_len, "max_model_len"
    return min(card.max_model_len, LEAST_TOKENS), None


def _dry_run(
    model: Model, card: ModelCard, config: EngineConfig, device: torch.device, start_token: int | None, compiled: bool
) -> int:
    """Bytes that the largest step took, with the tables that an engine keeps."""
    run = DryRun.of(card, config, sources=start_token is not None)
    if run is None:
        return 0
    before = torch.cuda.memory_allocated(device)
    engine = Engine(model, card, run.config, start_token=start_token)
    cache = (run.blocks + 2) * KVCache.bytes_per_block(model.spec, config.block_size, model.embedding.weight.dtype)
    peaks = []
    if not compiled:
        engine.compile_ahead(partial(run.compute, engine))
    for load in run.loads:
        torch.cuda.reset_peak_memory_stats(device)
        run.compute_one(engine, load)
        peaks.append(torch.cuda.max_memory_allocated(device) - before - cache)
    del engine
    torch.cuda.empty_cache()
    return max(peaks)
