"""Compiles what an engine will launch while its weights are still on their way: to know that, shapes are enough.

Rehearsed is what follows once the weights are there, with the same settings: the dry run that sizes the KV cache, then
warming up. That is done with a small cache, for nothing is written to it; only how long texts may be must be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from headrace.card import ModelCard
from headrace.kernels.model import Model
from headrace.workers.config import EngineConfig
from headrace.workers.dry_run import DryRun
from headrace.workers.engine import Engine
from headrace.workers.estimate import estimated
from headrace.workers.kv_size import expected_len
from headrace.workers.memory import GpuMemory
from headrace.workers.served import model_len

__all__ = ["Rehearsed", "rehearse"]

_READING = 3 << 30  # bytes that must stay free for who reads the weights, about twice what that takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What needs no rehearsal any more.

    Attributes:
        sizing: whether that is the dry run.
        max_model_len: of an engine whose warming up is; None if there is none.
    """

    sizing: bool = False
    max_model_len: int | None = None


def rehearse(
    model: Model, card: ModelCard, config: EngineConfig, memory: GpuMemory, *, start_token: int | None
) -> Rehearsed:
    """Compile all that can be told now; the rest, and what there was no memory for, is compiled later.

    Args:
        model: on a GPU; its weights are numbers, and may change meanwhile.
        card: of it.
        config: of its engine.
        memory: of the GPU before the model came.
        start_token: of an encoder-decoder.
    """
    run = DryRun.of(card, config, sources=start_token is not None)
    dtype = model.embedding.weight.dtype
    assert isinstance(dtype, torch.dtype)
    needs = estimated(model.spec, card, config, dtype)
    if run is None or needs.fixed + needs.workspace + run.blocks * needs.block + _READING > memory.allowed:
        return Rehearsed()
    model.reserve_positions(model_len(card, config))
    model.fold()  # what follows from the weights has its shape now, and its values once they are there
    try:
        if sizing := config.kv_tokens is None:
            engine = Engine(model, card, run.config, start_token=start_token)
            engine.compile_ahead(partial(run.compute, engine))
            del engine
        length = expected_len(card, config, memory, needs)
        if length is not None:
            small = run.config_of(config)
            Engine(model, card, small, start_token=start_token, max_model_len=length).compile_examples()
        return Rehearsed(sizing=sizing, max_model_len=length)
    except torch.OutOfMemoryError:
        return Rehearsed()
    finally:
        torch.cuda.empty_cache()  # what was for rehearsals is not to be counted as needed
