"""Which attention of prompts the kernel for Hopper GPUs computes, and its launch."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.hopper_load_triton import GROUPS, ROWS
from headrace.kernels.ops.hopper_triton import attend_on_hopper
from headrace.kernels.spec import AttentionSpec

__all__ = ["attend_as_hopper", "hopper_can_attend"]

# Keys of a tile and tiles on their way by head size: with queries and values they fill a processor. Smaller heads are
# not here: of texts of 128 and 512 tokens this kernel took longer than smaller tiles, 1.4 times with GPT-2's.
_TILES = {128: (64, 3)}
_FEWEST_SLOTS = 8  # of a block: rows that tensor cores read as one piece
_BOX = 64  # values that a copy takes side by side
_ALIGNMENT = 16  # bytes

# Registers of a thread: those that the hardware gives all of them, and then those of who multiplies and who loads.
_REGISTERS, _MULTIPLYING, _LOADING = 128, 160, 32


def hopper_can_attend(
    q_thd: Tensor, keys: Tensor, values: Tensor, batch: Batch, spec: AttentionSpec, *, first_sequence: int
) -> bool:
    """Whether the kernel is made for it, and has enough to do to be the faster one.

    It knows plain causal attention over a paged cache, of 16-bit values, for groups of heads that divide its rows.
    Few queries leave processors without any; then smaller tiles are better. With Llama-8B's heads on an H200 it took
    17.6 us of one prompt of 512 tokens (smaller tiles: 14.8), 27.9 (30.0) of 1,024, 77 (99) of 2,048, 912 (1,288) of
    8,192, and 93 (125) of 64 prompts of 128.
    """
    group = spec.num_heads // spec.num_kv_heads
    plain = (
        spec.causal and spec.window is None and spec.soft_cap is None and spec.alibi is None and spec.relative is None
    )
    if not plain or spec.head_dim not in _TILES or q_thd.element_size() != 2 or ROWS.value % group:
        return False
    size, columns = batch.block_size, _TILES[spec.head_dim][0]
    if size & (size - 1) or not _FEWEST_SLOTS <= size <= columns:
        return False
    rows = (len(q_thd) - first_sequence) * spec.num_heads
    return rows >= _fewest_rows(q_thd.device) and all(map(_can_be_copied, (q_thd, keys, values)))


def attend_as_hopper(
    q_thd: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    batch: Batch,
    spec: AttentionSpec,
    *,
    first_sequence: int,
) -> None:
    """As `headrace.kernels.ops.attend_triton.attend`, of what this one can."""
    group = spec.num_heads // spec.num_kv_heads
    columns, stages = _TILES[spec.head_dim]
    queries = GROUPS.value * ROWS.value // group
    num_sequences = len(batch.query_lens) - first_sequence
    places = (len(q_thd) - first_sequence) // queries + num_sequences  # each may end with a tile that is not full
    items = places * spec.num_kv_heads
    programs = min(items, _processors(q_thd.device))
    attend_on_hopper[(programs,)](
        out,
        _descriptor(q_thd, [ROWS.value // group, group, _BOX]),
        _descriptor(_in_blocks(keys, batch.block_size), [1, batch.block_size, _BOX]),
        _descriptor(_in_blocks(values, batch.block_size), [1, batch.block_size, _BOX]),
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        first_sequence,
        num_sequences,
        places,
        batch.block_tables.stride(0),
        spec.scale,
        triton.cdiv(items, programs),
        NUM_KV_HEADS=spec.num_kv_heads,
        HEADS=group,
        DIMS=spec.head_dim,
        BLOCK_SIZE=batch.block_size,
        COLUMNS=columns,
        STAGES=stages,
        LOADER_REGISTERS=_LOADING,
        REGISTERS=_MULTIPLYING,
        num_warps=4,
        maxnreg=_REGISTERS,
    )


def _in_blocks(cache_: Tensor, block_size: int) -> Tensor:
    """A cache [slots, kv heads, head dim] as [blocks, slots of a block, values]."""
    slots, heads, dims = cache_.shape
    stride = cache_.stride(0)
    return cache_.as_strided((slots // block_size, block_size, heads * dims), (block_size * stride, stride, 1))


def _descriptor(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout(128, 16, 3))


def _can_be_copied(tensor: Tensor) -> bool:
    """Whether the hardware can: it counts in 16 bytes."""
    aligned = tensor.data_ptr() % _ALIGNMENT == 0
    return aligned and tensor.stride(0) * tensor.element_size() % _ALIGNMENT == 0


@cache
def _fewest_rows(device: torch.device) -> float:
    """Rows of queries and heads that give all processors a tile; infinite where the kernel cannot run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return float("inf")
    return float(_processors(device) * GROUPS.value * ROWS.value)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
