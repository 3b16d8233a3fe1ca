"""The reference ops against plain restatements, on ragged batches over a scattered cache."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.kernels.batch import Batch
from headrace.kernels.ops.activation import gated
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.norm import add_rms_norm
from headrace.kernels.ops.rotary import rotary_table, rotate_and_cache
from tests.support.batches import make_batch

BLOCK = 4
NUM_BLOCKS = 64

# What a result may differ by from one computed in float64: rounding of the inputs' type, times the length of a sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plain_attention(q_thd, keys, values, batch: Batch, scale: float) -> torch.Tensor:
    """Softmax attention of one token after the other, in float64."""
    group = q_thd.shape[1] // keys.shape[1]
    out = []
    for row, (queries, context) in enumerate(zip(batch.query_lens, batch.context_lens_host, strict=True)):
        start = int(batch.query_starts[row])
        for query in range(queries):
            last = context - queries + query
            slots = [int(batch.block_tables[row, p // BLOCK]) * BLOCK + p % BLOCK for p in range(last + 1)]
            k = keys[slots].double().repeat_interleave(group, dim=1)
            v = values[slots].double().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,lhd->hl", q_thd[start + query].double(), k) * scale
            out.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(out)


# A lone decode; decodes of equal and of different length; whole prompts; later chunks; all of it in one batch; contexts
# that end inside a block, on its edge and one token after it.
SHAPES = [
    [(1, 1)],
    [(1, 9), (1, 9)],
    [(1, 4), (1, 5), (1, 17), (1, 1)],
    [(7, 7)],
    [(5, 13)],
    [(1, 6), (1, 11), (3, 3), (4, 12), (9, 10)],
]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [(6, 2, 20), (4, 4, 16), (5, 1, 64)])
@pytest.mark.parametrize("lens", SHAPES)
def test_attention_sees_its_own_context_and_nothing_else(lens, heads, dtype):
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(lens)
    # Slots that belong to nobody hold NaN: whatever reads them spoils its result. Only the last block is kept zero.
    keys = torch.full(((NUM_BLOCKS + 1) * BLOCK, num_kv_heads, head_dim), math.nan, dtype=dtype)
    values = keys.clone()
    keys[-BLOCK:] = values[-BLOCK:] = 0
    for row, context in enumerate(batch.context_lens_host):
        slots = [int(batch.block_tables[row, p // BLOCK]) * BLOCK + p % BLOCK for p in range(context)]
        keys[slots] = torch.randn(context, num_kv_heads, head_dim, generator=generator).to(dtype)
        values[slots] = torch.randn(context, num_kv_heads, head_dim, generator=generator).to(dtype)
    q_thd = torch.randn(len(batch.positions), num_heads, head_dim, generator=generator).to(dtype)
    found = paged_attention(q_thd, keys, values, batch, scale=0.3)
    assert found.dtype is dtype
    expected = plain_attention(q_thd, keys, values, batch, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rotation_is_that_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    num_heads, num_kv_heads, head_dim = 6, 2, 20
    batch = make_batch([(1, 6), (9, 30), (3, 3)])
    frequencies = tuple((10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)).tolist())
    table = rotary_table(frequencies, 40, 1.25, torch.device("cpu"))
    cos_sin = table[batch.positions]
    qkv = torch.randn(len(batch.positions), (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    q, k, v = (
        part.unflatten(1, (-1, head_dim))
        for part in qkv.clone().split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=1)
    )
    cos, sin = (torch.cat((x, x), -1)[None] for x in cos_sin.unbind(1))
    expected_q, expected_k = apply_rotary_pos_emb(q.float()[None], k.float()[None], cos, sin, unsqueeze_dim=2)

    keys = torch.zeros((NUM_BLOCKS + 1) * BLOCK, num_kv_heads, head_dim, dtype=dtype)
    values = torch.zeros_like(keys)
    found = rotate_and_cache(qkv, cos_sin, batch.slots, keys, values, num_heads=num_heads)

    torch.testing.assert_close(found, expected_q[0].to(dtype))
    torch.testing.assert_close(keys[batch.slots], expected_k[0].to(dtype))
    torch.testing.assert_close(values[batch.slots], v)
    others = torch.ones(len(keys), dtype=torch.bool)
    others[batch.slots] = False
    assert not keys[others].any()
    assert not values[others].any()


def test_rotation_may_leave_the_end_of_a_head_alone():
    table = rotary_table((1.0, 0.1), 10, 1.0, torch.device("cpu"))
    qkv = torch.randn(2, 3 * 6)
    keys, values = torch.zeros(8, 1, 6), torch.zeros(8, 1, 6)
    before = qkv.clone()
    q = rotate_and_cache(qkv, table[torch.tensor([3, 7])], torch.tensor([0, 5]), keys, values, num_heads=1)
    assert torch.equal(q[:, 0, 4:], before[:, 4:6])
    assert not torch.equal(q[:, 0, :4], before[:, :4])
    torch.testing.assert_close(q.norm(dim=-1), before[:, :6].norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 8), (5, 72), (3, 1000)])
def test_norm_adds_the_residual_first(dtype, shape):
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    for before in (residual, None):
        total = x if before is None else x + before
        wide = total.double()
        expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        found, carried = add_rms_norm(x, before, weight, 1e-5)
        assert torch.equal(carried, total)
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gate_is_the_first_half(dtype):
    gate, up = torch.randn(4, 33).to(dtype), torch.randn(4, 33).to(dtype)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    found = gated(torch.cat((gate, up), 1), "silu")
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
