"""What a model needs of a GPU, as far as its sizes and the settings tell: known before any weight is read."""

from __future__ import annotations

import dataclasses

import torch

from headrace.card import ModelCard
from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from headrace.kernels.quantize import Scheme, find_scheme, schemes_of
from headrace.kernels.spec import ModelSpec
from headrace.kernels.tuning import MOST_ROWS
from headrace.workers.config import EngineConfig
from headrace.workers.encoder_graphs import sizes_of_batches
from headrace.workers.graphs import decode_sizes, prompt_sizes
from headrace.workers.memory import Needs, graph_bytes, step_bytes
from headrace.workers.served import model_len

__all__ = ["blank_model", "estimated", "estimated_graphs", "estimated_step", "quartered", "saved_by", "weight_bytes"]


def estimated(
    spec: ModelSpec, card: ModelCard, config: EngineConfig, dtype: torch.dtype, device: torch.device | None = None
) -> Needs:
    """What an engine that serves needs, at least.

    Args:
        spec: of the model.
        card: likewise.
        config: of the engine.
        dtype: of weights and activations.
        device: that is to compute; None, if it does not matter what else the weights could be kept in.
    """
    blank = blank_model(spec, dtype, find_scheme(config.quantize))
    workspace, graphs = _step(spec, card, config, dtype), _graphs(spec, card, config, dtype)
    quarter = quartered(config)
    least = _step(spec, card, quarter, dtype) + _graphs(spec, card, quarter, dtype)
    return Needs(
        weights=weight_bytes(blank),
        workspace=workspace,
        graphs=graphs,
        block=0 if spec.is_encoder else KVCache.bytes_per_block(spec, config.block_size, dtype),
        block_size=config.block_size,
        saved_by=saved_by(blank, device),
        saved_by_quarter=workspace + graphs - least,
    )


def blank_model(spec: ModelSpec, dtype: torch.dtype, scheme: Scheme | None) -> Model:
    """A model that has shapes and no memory."""
    return Model(spec, dtype=dtype, device="meta", scheme=scheme)


def weight_bytes(model: Model) -> int:
    """Of all weights, with the factors of those that are quantized."""
    return sum(weight.nbytes for weight in (*model.parameters(), *model.scales().values()))


def saved_by(model: Model, device: torch.device | None) -> dict[str, int]:
    """Bytes by which a model would be smaller if its layers were quantized, by the name of each scheme that the device
    computes with; empty if they are."""
    if model.scheme is not None:
        return {}
    weights = [part.weight.flatten(0, -2) for part in model.projections().values()]
    saved = {}
    for scheme in schemes_of(device):
        saved[scheme.name] = sum(
            weight.nbytes
            - weight.numel() * scheme.dtype.itemsize
            - len(weight) * (scheme.factors or weight.dtype).itemsize
            for weight in weights
        )
    return saved


def quartered(config: EngineConfig) -> EngineConfig:
    """The settings with a quarter of the tokens and of the sequences of a step."""
    return dataclasses.replace(
        config, max_batch_tokens=-(-config.max_batch_tokens // 4), max_num_seqs=-(-config.max_num_seqs // 4)
    )


def estimated_step(spec: ModelSpec, dtype: torch.dtype, *, tokens: int, rows: int) -> int:
    """Least workspace of a step of so many tokens, of which so many rows are sampled."""
    widest = max(max(layer.attention.qkv_size, (3 if layer.mlp.gated else 2) * layer.mlp.size) for layer in spec.layers)
    return step_bytes(
        tokens=tokens,
        rows=rows,
        hidden=spec.hidden_size,
        widest=widest,
        vocab=spec.vocab_size,
        value=dtype.itemsize,
    )


def estimated_graphs(spec: ModelSpec, config: EngineConfig, dtype: torch.dtype, *, tokens: int, step: int) -> int:
    """What captured graphs keep.

    Args:
        spec: of the model.
        config: of the engine.
        dtype: of activations.
        tokens: of the largest step.
        step: the workspace that they share; 0 for what is certain.
    """
    if not config.cuda_graphs:
        return 0
    sources = sizes_of_batches(tokens, config.max_num_seqs)
    if spec.is_encoder:  # states of all tokens, and of each text, and of what fills it up, their mean and the first
        kept = [spec.hidden_size * (count * dtype.itemsize + 2 * (texts + 1) * 4) for count, texts in sources]
        return graph_bytes(kept, step=step)
    rows = list(decode_sizes(config.max_num_seqs))
    if spec.encoder is None:
        rows += [config.max_num_seqs] * len(prompt_sizes(tokens))
    else:  # whose graphs have no logits
        rows += [0] * len(sources)
    return graph_bytes([count * spec.vocab_size * 4 for count in rows], step=step)


def _step(spec: ModelSpec, card: ModelCard, config: EngineConfig, dtype: torch.dtype) -> int:
    tokens = _step_tokens(spec, card, config)
    rows = config.max_num_seqs
    if spec.is_encoder:  # any token may be a mask
        rows = min(MOST_ROWS, tokens) if spec.head is not None else 0
    return estimated_step(spec, dtype, tokens=tokens, rows=rows)


def _graphs(spec: ModelSpec, card: ModelCard, config: EngineConfig, dtype: torch.dtype) -> int:
    return estimated_graphs(spec, config, dtype, tokens=_step_tokens(spec, card, config), step=0)


def _step_tokens(spec: ModelSpec, card: ModelCard, config: EngineConfig) -> int:
    """Of the largest step: an encoder reads any text whole."""
    return max(config.max_batch_tokens, model_len(card, config)) if spec.is_encoder else config.max_batch_tokens
