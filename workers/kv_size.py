"""How large the KV cache of a GPU's engine gets: refused before the weights are read, or measured once they are there.

The measurement is a dry run: an engine with a small cache computes the largest steps that the settings allow. What
they took is right whatever kernels and samplers do, which no formula is for long; and it costs little, for the kernels
that it compiles are those that serve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from headrace.card import ModelCard
from headrace.errors import ModelError
from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from headrace.kernels.spec import ModelSpec
from headrace.messages import Assignment, pack_tokens
from headrace.workers.config import EngineConfig
from headrace.workers.device import gpu_memory
from headrace.workers.encoder_graphs import sizes_of_batches
from headrace.workers.engine import Engine
from headrace.workers.graphs import decode_sizes, prompt_sizes
from headrace.workers.memory import (
    LEAST_TOKENS,
    GpuMemory,
    Needs,
    check_fits,
    graph_bytes,
    kv_blocks,
    step_bytes,
)
from headrace.workers.served import model_len
from headrace.workers.warmup import all_options, longest_text

__all__ = ["check_before_loading", "with_measured_cache"]

_MORE = 2  # tokens that texts are continued by
_MARGIN = 1.05  # of what was measured: memory is handed out in pieces


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
    needs = _estimated(spec, card, config, dtype)
    check_fits(memory, needs, name=card.name, tokens=tokens, dtype=card.dtype, asked=asked)
    return memory


def with_measured_cache(
    model: Model, card: ModelCard, config: EngineConfig, memory: GpuMemory | None, *, start_token: int | None
) -> EngineConfig:
    """The settings with the size of the KV cache, where neither they nor a CPU's defaults say it.

    Args:
        model: with its weights, on the GPU.
        card: of it.
        config: of the engine.
        memory: of the GPU before the weights came.
        start_token: of an encoder-decoder.

    Raises:
        ConfigError: a setting asks for too much.
        ModelError: it does not fit at all.
    """
    if memory is None or config.kv_tokens is not None:
        return config
    length = model_len(card, config)
    model.reserve_positions(length)
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    assert isinstance(device, torch.device)
    assert isinstance(dtype, torch.dtype)
    try:
        largest = _dry_run(model, card, config, device, start_token)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{card.name} fits on the GPU, but the largest step that the settings allow does not: "
            f"{str(error).partition(chr(10))[0]} Lower --max-num-batched-tokens or --max-num-seqs.",
            param="max_num_batched_tokens",
        ) from error
    now = gpu_memory(device, config.gpu_memory_utilization)
    needs = Needs(
        weights=max(0, now.held - memory.held),  # and tables, and the code of kernels
        workspace=int(largest * _MARGIN),
        graphs=_graphs(model.spec, config, int(largest * _MARGIN)),
        block=KVCache.bytes_per_block(model.spec, config.block_size, dtype),
        block_size=config.block_size,
    )
    tokens, asked = _least_cache(card, config)
    check_fits(memory, needs, name=card.name, tokens=tokens, dtype=card.dtype, asked=asked)
    blocks = kv_blocks(memory, needs, max_model_len=length, max_num_seqs=config.max_num_seqs)
    return dataclasses.replace(config, kv_tokens=blocks * config.block_size)


def _least_cache(card: ModelCard, config: EngineConfig) -> tuple[int, str | None]:
    """Tokens that the cache must hold, and the setting that says so."""
    if config.kv_tokens is not None:
        return config.kv_tokens, "kv_tokens"
    if config.max_model_len is not None:
        return config.max_model_len, "max_model_len"
    return min(card.max_model_len, LEAST_TOKENS), None


def _estimated(spec: ModelSpec, card: ModelCard, config: EngineConfig, dtype: torch.dtype) -> Needs:
    """What is known without the weights."""
    blank = Model(spec, dtype=dtype, device="meta")
    tokens = max(config.max_batch_tokens, model_len(card, config)) if spec.is_encoder else config.max_batch_tokens
    widest = max(max(layer.attention.qkv_size, (3 if layer.mlp.gated else 2) * layer.mlp.size) for layer in spec.layers)
    rows = 0 if spec.is_encoder else config.max_num_seqs
    return Needs(
        weights=sum(parameter.nbytes for parameter in blank.parameters()),
        workspace=step_bytes(
            tokens=tokens,
            rows=rows,
            hidden=spec.hidden_size,
            widest=widest,
            vocab=spec.vocab_size,
            value=dtype.itemsize,
        ),
        graphs=0 if spec.is_encoder else _graphs(spec, config, 0),
        block=0 if spec.is_encoder else KVCache.bytes_per_block(spec, config.block_size, dtype),
        block_size=config.block_size,
    )


def _graphs(spec: ModelSpec, config: EngineConfig, step: int) -> int:
    if not config.cuda_graphs:
        return 0
    rows = list(decode_sizes(config.max_num_seqs))
    if spec.encoder is None:
        rows += [config.max_num_seqs] * len(prompt_sizes(config.max_batch_tokens))
    else:  # whose graphs have no logits
        rows += [0] * len(sizes_of_batches(config.max_batch_tokens, config.max_num_seqs))
    return graph_bytes(rows=rows, vocab=spec.vocab_size, step=step)


def _dry_run(model: Model, card: ModelCard, config: EngineConfig, device: torch.device, start_token: int | None) -> int:
    """Bytes that the largest step took, with the tables that an engine keeps."""
    rows, size, limit = config.max_num_seqs, config.block_size, model_len(card, config)
    sources = start_token is not None
    most = longest_text(limit, _MORE, block_size=size, sources=sources)
    if most < 1:
        return 0
    share = min(-(-config.max_batch_tokens // rows), most)
    longest = most if sources else min(config.max_batch_tokens, most)  # a source is read in one piece, however long
    # One more for where the next token goes, and all twice: sources have blocks of their own.
    blocks = 2 * max(count * (-(-(length + _MORE) // size) + 1) for count, length in ((rows, share), (1, longest)))
    small = dataclasses.replace(config, kv_tokens=blocks * size, cuda_graphs=False, prefix_cache=False)
    before = torch.cuda.memory_allocated(device)
    engine = Engine(model, card, small, start_token=start_token)
    cache = (blocks + 2) * KVCache.bytes_per_block(model.spec, size, model.embedding.weight.dtype)
    peaks = []
    loads = ((rows, share), (1, longest))
    engine.compile_ahead(partial(_compute, engine, loads))
    for load in loads:
        torch.cuda.reset_peak_memory_stats(device)
        _compute(engine, (load,))
        peaks.append(torch.cuda.max_memory_allocated(device) - before - cache)
    del engine
    torch.cuda.empty_cache()
    return max(peaks)


def _compute(engine: Engine, loads: Iterable[tuple[int, int]]) -> None:
    """So many texts of one length together, for each load."""
    for count, length in loads:
        for assignment in _prompts(count, length, engine.card.vocab_size):
            engine.add(assignment, 0.0)
        while engine.has_work:
            engine.step(0.0)


def _prompts(count: int, length: int, vocab: int) -> Iterator[Assignment]:
    """Texts of one length that differ, to be continued with everything asked for."""
    for row in range(count):
        prompt = pack_tokens((row + place) % vocab for place in range(length))
        sampling = all_options() | {"max_tokens": _MORE, "ignore_eos": True, "seed": 1}
        yield Assignment(request=b"dry-%d" % row, choice=0, attempt=0, prompt=prompt, sampling=sampling)
