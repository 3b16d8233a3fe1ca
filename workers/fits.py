"""Refuses what does not fit on a GPU, with the arithmetic, and says what would. Imports no torch.

A person can do something about a refusal only by the names that they know: options of a command where models are
served, arguments where a program calls the library. The arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.errors import ConfigError, ModelError
from headrace.workers.memory import GIB, LEAST_TOKENS, SPARE_BLOCKS, GpuMemory, Needs

__all__ = ["as_argument", "as_option", "check_fits"]


def as_option(name: str, value: object) -> str:
    """A setting as it is given to a command: --max-model-len 5."""
    return f"--{name.replace('_', '-')} {value}"


def as_argument(name: str, value: object) -> str:
    """A setting as it is given to a function: min_tokens=5."""
    return f"{name}={value!r}"


def check_fits(
    memory: GpuMemory,
    needs: Needs,
    *,
    name: str,
    tokens: int,
    dtype: str,
    asked: str | None = None,
    least: int = LEAST_TOKENS,
    spelled: Callable[[str, object], str] = as_option,
) -> None:
    """Refuse what does not fit, with the arithmetic, and say what would.

    Args:
        memory: of the GPU.
        needs: of the engine.
        name: of the model.
        tokens: that the KV cache must hold.
        dtype: of the weights.
        asked: the setting that asked for so many tokens, if one did: kv_tokens, max_model_len or min_tokens.
        least: tokens of the smallest cache that is worth to be advised.
        spelled: how a setting and its value are written where this is read.

    Raises:
        ConfigError: the setting asks for too much.
        ModelError: the model does not fit at all.
    """
    least = min(tokens, least)
    needed = needs.fixed + needs.cache(tokens)
    if needed <= memory.allowed:
        return
    parts = {
        "weights": needs.weights,
        f"a KV cache of {tokens:,} token{'s' if tokens != 1 else ''}": needs.cache(tokens),
        "the largest step": needs.workspace,
        "CUDA graphs": needs.graphs,
    }
    shown = " + ".join(f"{what} {_gib(size)}" for what, size in parts.items() if size)
    room = (memory.allowed - needs.fixed) // needs.block - SPARE_BLOCKS if needs.block else 0
    remedies = []
    if asked is not None and room * needs.block_size >= least:
        remedies.append(f"{spelled(asked, room * needs.block_size)} or less")
    remedies += _by_settings(memory, needs, needed, dtype, spelled) + _by_the_gpu(memory, needed)
    message = (
        f"{name} does not fit on the GPU: {shown} = {_gib(needed)}, but {_gib(memory.allowed)} of its "
        f"{_gib(memory.total)} are {_limit(memory)}. What helps: {'; '.join([*remedies, spelled('device', 'cpu')])}."
    )
    if asked is not None and needs.fixed + needs.cache(least) <= memory.allowed:
        raise ConfigError(message, param=asked)
    raise ModelError(message, param="model")


def _limit(memory: GpuMemory) -> str:
    if memory.utilization is None:
        return "free"
    held = f", of which others hold {_gib(memory.held)}" if memory.held >= GIB // 10 else ""
    return f"allowed ({as_option('gpu_memory_utilization', format(memory.utilization, 'g'))}{held})"


def _by_settings(
    memory: GpuMemory, needs: Needs, needed: int, dtype: str, spelled: Callable[[str, object], str]
) -> list[str]:
    """Settings with which it would fit, each by itself."""
    found = []
    if dtype == "float32" and (needed + 1) // 2 <= memory.allowed:
        found.append(f"{spelled('dtype', 'bfloat16')}, which needs half of it")
    found += [
        f"{spelled('quantize', scheme)}, with which the weights take {_gib(needs.weights - saved)}"
        for scheme, saved in needs.saved_by.items()
        if needed - saved <= memory.allowed
    ]
    if needs.saved_by_quarter and needed - needs.saved_by_quarter <= memory.allowed:
        found.append("a quarter of --max-num-batched-tokens and of --max-num-seqs")
    if needs.graphs and needed - needs.graphs <= memory.allowed:
        found.append("--enforce-eager, which has no CUDA graphs and is slower")
    return found


def _by_the_gpu(memory: GpuMemory, needed: int) -> list[str]:
    """What of the GPU, or which other one, would do."""
    if memory.utilization is None:
        frees = ["freeing what else is on the GPU"] if needed <= memory.total else []
        return [*frees, f"a GPU with {_gib(needed)}"]
    found = []
    share = -(-needed * 100 // memory.total) / 100
    if memory.utilization < share <= memory.free_share and needed <= memory.left:
        found.append(as_option("gpu_memory_utilization", format(share, "g")))
    most = min(memory.utilization, memory.free_share)
    if needed <= memory.total * most:
        found.append("ending what else runs on the GPU")
    return [*found, f"a GPU with {_gib(int(needed / most))}"]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
