"""How much memory there is, what an engine needs of it, and what is left for its KV cache. Imports no torch.

Of a GPU an engine may hold `--gpu-memory-utilization` of the total, as others define it: a limit for one engine, so two
can share a GPU with less each. It never counts on what other programs hold. Out of this come, in this order,

    weights      known from the files' headers, before anything is read
    workspace    the tensors of the largest step, and the tables of rows that stay
    graphs       what captured steps, and captured sources, keep to themselves
    KV cache     the rest, as far as all sequences at full length can use it

The workspace is estimated from the model's sizes (`headrace.workers.estimate`), low, to refuse what cannot fit before
gigabytes are read (`headrace.workers.fits`); the cache is then sized by what a dry run of the largest step took
(`headrace.workers.kv_size`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "GIB",
    "LEAST_TOKENS",
    "SPARE_BLOCKS",
    "GpuMemory",
    "Needs",
    "available_bytes",
    "default_kv_blocks",
    "graph_bytes",
    "kv_blocks",
    "step_bytes",
]

GIB = 1 << 30
LEAST_TOKENS = 2048  # a cache for less is of no use, unless texts are shorter
SPARE_BLOCKS = 2  # the cache has so many beyond those that sequences use

_CPU_SHARE = 0.25
_GPU_SHARE = 0.85  # of what the weights left; the rest is for the tensors of a step
_CPU_MOST = 2 * 2**30  # a CPU reads that much in about a second per step: more sequences would only crawl
_FREE_SHARE = 0.95  # of what others leave: memory is handed out in pieces, and theirs may grow
_GRAPH_BYTES = 16 << 20  # of one graph, for its own description on the device; about 8 MiB for 32 layers


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Of one GPU, in bytes.

    Attributes:
        total: all of it.
        held: by other programs, the driver, and what else this process has there.
        utilization: share of the total that the engine may hold; None lets it hold all that is free.
    """

    total: int
    held: int
    utilization: float | None

    @property
    def free_share(self) -> float:
        """The part of what others leave that the engine may hold."""
        return 1.0 if self.utilization is None else _FREE_SHARE

    @property
    def left(self) -> int:
        """That part in bytes."""
        return max(0, int((self.total - self.held) * self.free_share))

    @property
    def allowed(self) -> int:
        """What the engine may hold."""
        return self.left if self.utilization is None else min(int(self.total * self.utilization), self.left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an engine needs of a GPU, in bytes.

    Attributes:
        weights: of the model.
        workspace: tensors of the largest step, and tables that stay.
        graphs: kept by what is captured.
        block: one block of the KV cache over all layers; 0 for a model without one.
        block_size: tokens of a block.
        saved_by: of the weights, by the name of each scheme that the GPU computes with; empty if they are quantized.
        saved_by_quarter: of all, if steps had a quarter of their tokens and sequences.
    """

    weights: int
    workspace: int
    graphs: int = 0
    block: int = 0
    block_size: int = 1
    saved_by: Mapping[str, int] = field(default_factory=dict)
    saved_by_quarter: int = 0

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.workspace + self.graphs

    def cache(self, tokens: int) -> int:
        """The KV cache of so many tokens."""
        return (-(-tokens // self.block_size) + SPARE_BLOCKS) * self.block if self.block else 0


def step_bytes(*, tokens: int, rows: int, hidden: int, widest: int, vocab: int, value: int) -> int:
    """Least workspace of a step, of values of `value` bytes.

    Counted are the tensors that are alive at the widest place of a layer, and of the rows that are sampled the logits,
    once as they come and twice in float32, as the sampler needs them.
    """
    return tokens * (3 * hidden + widest) * value + rows * vocab * (value + 8)


def graph_bytes(kept: Sequence[int], *, step: int) -> int:
    """What graphs keep: one common workspace, and of each its results and description.

    Args:
        kept: results of each graph.
        step: workspace of the largest one.
    """
    return step + sum(kept) + len(kept) * _GRAPH_BYTES if kept else 0


def kv_blocks(memory: GpuMemory, needs: Needs, *, max_model_len: int, max_num_seqs: int) -> int:
    """Blocks of the KV cache: what is left, and no more than all sequences at full length can use; may be none."""
    left = (memory.allowed - needs.fixed) // needs.block - SPARE_BLOCKS
    return max(0, min(left, max_num_seqs * -(-max_model_len // needs.block_size)))


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
