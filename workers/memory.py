"""How much memory there is, and how much of it a KV cache should take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["available_bytes", "default_kv_blocks"]

_CPU_SHARE = 0.25
_GPU_SHARE = 0.85  # of what the weights left; the rest is for the tensors of a step
_CPU_MOST = 2 * 2**30  # a CPU reads that much in about a second per step: more sequences would only crawl


def available_bytes() -> int:
    """Memory that can be had without swapping, within the control group's limit."""
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
    """Blocks for a share of the device's free memory, and no more than all sequences at full length can use."""
    if device.type == "cuda":
        import torch

        room = int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    else:
        room = min(int(available_bytes() * _CPU_SHARE), _CPU_MOST)
    useful = max_num_seqs * -(-max_model_len // block_size)
    return max(1, min(room // bytes_per_block, useful))
