"""How much memory there is, what an engine needs of it, and what is left for its KV cache. Imports no torch.

Of a GPU an engine may hold `--gpu-memory-utilization` of the total, as others define it: a limit for one engine, so two
can share a GPU with less each. It never counts on what other programs hold. Out of this come, in this order,

    weights      known from the files' headers, before anything is read
    workspace    the tensors of the largest step, and the tables of rows that stay
    graphs       what captured steps, and captured sources, keep to themselves
    KV cache     the rest, as far as all sequences at full length can use it

The workspace is estimated from the model's sizes, low, to refuse what cannot fit before gigabytes are read; the cache
is then sized by what a dry run of the largest step took (`headrace.workers.kv_size`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

__all__ = [
    "LEAST_TOKENS",
    "GpuMemory",
    "Needs",
    "available_bytes",
    "check_fits",
    "default_kv_blocks",
    "graph_bytes",
    "kv_blocks",
    "step_bytes",
]

LEAST_TOKENS = 2048  # a cache for less is of no use, unless texts are shorter

_CPU_SHARE = 0.25
_GPU_SHARE = 0.85  # of what the weights left; the rest is for the tensors of a step
_CPU_MOST = 2 * 2**30  # a CPU reads that much in about a second per step: more sequences would only crawl
_FREE_SHARE = 0.95  # of what others leave: memory is handed out in pieces, and theirs may grow
_SPARE_BLOCKS = 2  # the cache has so many beyond those that sequences use
_GRAPH_BYTES = 16 << 20  # of one graph, for its own description on the device; about 8 MiB for 32 layers
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Of one GPU, in bytes.

    Attributes:
        total: all of it.
        held: by other programs, the driver, and what else this process has there.
        utilization: share of the total that the engine may hold.
    """

    total: int
    held: int
    utilization: float

    @property
    def allowed(self) -> int:
        """What the engine may hold."""
        return max(0, min(int(self.total * self.utilization), int((self.total - self.held) * _FREE_SHARE)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an engine needs of a GPU, in bytes.

    Attributes:
        weights: of the model.
        workspace: tensors of the largest step, and tables that stay.
        graphs: kept by captured steps.
        block: one block of the KV cache over all layers; 0 for a model without one.
        block_size: tokens of a block.
        saved_by_int8: of the weights, if they were quantized; 0 if they are.
    """

    weights: int
    workspace: int
    graphs: int = 0
    block: int = 0
    block_size: int = 1
    saved_by_int8: int = 0

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.workspace + self.graphs

    def cache(self, tokens: int) -> int:
        """The KV cache of so many tokens."""
        return (-(-tokens // self.block_size) + _SPARE_BLOCKS) * self.block if self.block else 0


def step_bytes(*, tokens: int, rows: int, hidden: int, widest: int, vocab: int, value: int) -> int:
    """Least workspace of a step, of values of `value` bytes.

    Counted are the tensors that are alive at the widest place of a layer, and of the rows that are sampled the logits,
    once as they come and twice in float32, as the sampler needs them.
    """
    return tokens * (3 * hidden + widest) * value + rows * vocab * (value + 8)


def graph_bytes(*, rows: list[int], vocab: int, step: int) -> int:
    """What graphs of steps keep: one common workspace, and of each its logits and description.

    Args:
        rows: of logits, of each graph.
        vocab: values of a row of logits.
        step: workspace of the largest step.
    """
    return step + sum(rows) * vocab * 4 + len(rows) * _GRAPH_BYTES if rows else 0


def kv_blocks(memory: GpuMemory, needs: Needs, *, max_model_len: int, max_num_seqs: int) -> int:
    """Blocks of the KV cache: what is left, and no more than all sequences at full length can use; may be none."""
    left = (memory.allowed - needs.fixed) // needs.block - _SPARE_BLOCKS
    return max(0, min(left, max_num_seqs * -(-max_model_len // needs.block_size)))


def check_fits(
    memory: GpuMemory, needs: Needs, *, name: str, tokens: int, dtype: str, asked: str | None = None
) -> None:
    """Refuse what does not fit, with the arithmetic, and say what would.

    Args:
        memory: of the GPU.
        needs: of the engine.
        name: of the model.
        tokens: that the KV cache must hold.
        dtype: of the weights.
        asked: the setting that asked for so many tokens, if one did: kv_tokens or max_model_len.

    Raises:
        ConfigError: the setting asks for too much.
        ModelError: the model does not fit at all.
    """
    least = min(tokens, LEAST_TOKENS)
    needed = needs.fixed + needs.cache(tokens)
    if needed <= memory.allowed:
        return
    parts = {
        "weights": needs.weights,
        f"a KV cache of {tokens:,} tokens": needs.cache(tokens),
        "the largest step": needs.workspace,
        "CUDA graphs": needs.graphs,
    }
    shown = " + ".join(f"{what} {_gib(size)}" for what, size in parts.items() if size)
    held = f", of which others hold {_gib(memory.held)}" if memory.held >= _GIB // 10 else ""
    message = (
        f"{name} does not fit on the GPU: {shown} = {_gib(needed)}, but {_gib(memory.allowed)} of its "
        f"{_gib(memory.total)} are allowed (--gpu-memory-utilization {memory.utilization:g}{held}). "
        f"What helps: {'; '.join(_remedies(memory, needs, tokens, least, dtype, asked))}."
    )
    if asked is not None and needs.fixed + needs.cache(least) <= memory.allowed:
        raise ConfigError(message, param=asked)
    raise ModelError(message, param="model")


def _remedies(memory: GpuMemory, needs: Needs, tokens: int, least: int, dtype: str, asked: str | None) -> list[str]:
    """What would make it fit, each by itself."""
    found = []
    allowed, needed = memory.allowed, needs.fixed + needs.cache(tokens)
    room = (allowed - needs.fixed) // needs.block - _SPARE_BLOCKS if needs.block else 0
    if asked is not None and room * needs.block_size >= least:
        found.append(f"--{asked.replace('_', '-')} {room * needs.block_size} or less")
    if dtype == "float32" and (needed + 1) // 2 <= allowed:
        found.append("--dtype bfloat16, which needs half of it")
    if needs.saved_by_int8 and needed - needs.saved_by_int8 <= allowed:
        found.append(f"--quantize int8, with which the weights take {_gib(needs.weights - needs.saved_by_int8)}")
    if needed - needs.workspace * 3 // 4 <= allowed:
        found.append("a quarter of --max-num-batched-tokens and of --max-num-seqs")
    share = -(-needed * 100 // memory.total) / 100
    if memory.utilization < share <= _FREE_SHARE and needed <= (memory.total - memory.held) * _FREE_SHARE:
        found.append(f"--gpu-memory-utilization {share:g}")
    if needed <= memory.total * min(memory.utilization, _FREE_SHARE):
        found.append("ending what else runs on the GPU")
    return [*found, f"a GPU with {_gib(int(needed / min(memory.utilization, _FREE_SHARE)))}", "--device cpu"]


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def available_bytes() -> int:
    """Memory of the host that can be had without swapping, within the control group's limit."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(most) - int(used.read_text())))
    return available


def default_kv_blocks(
    device: torch.device, *, bytes_per_block: int, block_size: int, max_model_len: int, max_num_seqs: int
) -> int:
    """Blocks for a share of the device's free memory, and no more than all sequences at full length can use.

    For a GPU that is a guess, for engines that are made of a model in the middle of a program; those that serve are
    measured (`headrace.workers.kv_size`).
    """
    if device.type == "cuda":
        import torch

        room = int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    else:
        room = min(int(available_bytes() * _CPU_SHARE), _CPU_MOST)
    useful = max_num_seqs * -(-max_model_len // block_size)
    return max(1, min(room // bytes_per_block, useful))
