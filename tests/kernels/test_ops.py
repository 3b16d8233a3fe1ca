"""The reference ops against plain restatements, on ragged batches over a scattered cache."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from headrace.kernels.batch import Batch
from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.linear import linear, pack_weight
from headrace.kernels.ops.norm import norm
from headrace.kernels.ops.rotary import rotary_table, rotate_and_cache
from headrace.kernels.spec import Alibi, AttentionSpec, NormSpec, RotarySpec
from tests.support.batches import make_batch

BLOCK = 4
NUM_BLOCKS = 64

# What a result may differ by from one computed in float64: rounding of the inputs' type, times the length of a sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plain_attention(q_thd, keys, values, batch: Batch, spec: AttentionSpec) -> torch.Tensor:
    """Softmax attention of one token after the other, in float64."""
    group = spec.num_heads // spec.num_kv_heads
    out = []
    for row, (queries, context) in enumerate(zip(batch.query_lens, batch.context_lens_host, strict=True)):
        start = int(batch.query_starts[row])
        for query in range(queries):
            last = context - queries + query
            first = 0 if spec.window is None else max(0, last - spec.window + 1)
            seen = range(first, last + 1)
            slots = [int(batch.block_tables[row, p // BLOCK]) * BLOCK + p % BLOCK for p in seen]
            k = keys[slots].double().repeat_interleave(group, dim=1)
            v = values[slots].double().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,lhd->hl", q_thd[start + query].double(), k) * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * (scores / spec.soft_cap).tanh()
            if spec.alibi is not None:
                slopes = torch.tensor(spec.alibi.slopes)[:, None]
                products = slopes.bfloat16() * torch.tensor(seen) if spec.alibi.rounded else slopes * torch.tensor(seen)
                scores += products.double() * spec.alibi.scale
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


# (heads, kv heads, head dim): groups of 3, none, all; sizes of no power of two.
HEADS = [(6, 2, 20), (4, 4, 16), (5, 1, 64)]

# Alone and together; windows shorter and longer than the contexts; slopes too steep for a power of two.
EXTRAS = {
    "plain": {},
    "window": {"window": 5},
    "long window": {"window": 100},
    "soft cap": {"soft_cap": 1.5},
    "alibi": {"alibi": True},
    "rounded alibi": {"alibi": True, "rounded": True},
    "all": {"window": 6, "soft_cap": 2.0, "alibi": True},
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("extra", list(EXTRAS))
@pytest.mark.parametrize("lens", SHAPES)
def test_attention_sees_its_own_context_and_nothing_else(lens, extra, heads, dtype):
    num_heads, num_kv_heads, head_dim = heads
    settings = dict(EXTRAS[extra])
    if settings.pop("alibi", False):
        slopes = tuple(0.7 / (index + 1) for index in range(num_heads))
        settings["alibi"] = Alibi(slopes=slopes, rounded=settings.pop("rounded", False), scale=0.5)
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=0.3, **settings)
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
    found = paged_attention(q_thd, keys, values, batch, spec)
    assert found.dtype is dtype
    expected = plain_attention(q_thd, keys, values, batch, spec)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ------------------------------------------------------------------------------------------------- rotation and cache

ATTENTION = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=20, scale=1.0)


def run_rotation(qkv, batch, spec: AttentionSpec, **settings):
    """Queries, and keys and values as they are in the cache; nothing but the batch's slots may have been written."""
    keys = torch.zeros((NUM_BLOCKS + 1) * BLOCK, spec.num_kv_heads, spec.head_dim, dtype=qkv.dtype)
    values = torch.zeros_like(keys)
    queries = rotate_and_cache(qkv.clone(), batch.slots, keys, values, spec, **settings)
    others = torch.ones(len(keys), dtype=torch.bool)
    others[batch.slots] = False
    assert not keys[others].any()
    assert not values[others].any()
    return queries, keys[batch.slots], values[batch.slots]


def split(qkv, spec: AttentionSpec):
    """Queries, keys and values [T, heads, head dim]."""
    sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    return qkv.view(len(qkv), -1, spec.head_dim).split(sizes, dim=1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rotation_is_that_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    batch = make_batch([(1, 6), (9, 30), (3, 3)])
    frequencies = tuple((10000.0 ** (-torch.arange(0, 20, 2) / 20)).tolist())
    table = rotary_table(RotarySpec(inverse_frequencies=frequencies, attention_factor=1.25), 40, torch.device("cpu"))
    cos_sin = table[batch.positions]
    qkv = torch.randn(len(batch.positions), ATTENTION.qkv_size).to(dtype)
    q, k, v = split(qkv, ATTENTION)
    cos, sin = (torch.cat((x, x), -1)[None] for x in cos_sin.unbind(1))
    expected_q, expected_k = apply_rotary_pos_emb(q.float()[None], k.float()[None], cos, sin, unsqueeze_dim=2)
    found_q, found_k, found_v = run_rotation(qkv, batch, ATTENTION, cos_sin=cos_sin)
    torch.testing.assert_close(found_q, expected_q[0].to(dtype))
    torch.testing.assert_close(found_k, expected_k[0].to(dtype))
    assert torch.equal(found_v, v)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_interleaved_rotation_turns_neighbours(dtype):
    batch = make_batch([(1, 6), (9, 30)])
    table = rotary_table(RotarySpec(inverse_frequencies=(1.0, 0.3, 0.01)), 40, torch.device("cpu"))
    qkv = torch.randn(len(batch.positions), ATTENTION.qkv_size).to(dtype)
    q, k, _ = split(qkv, ATTENTION)
    found_q, found_k, _ = run_rotation(qkv, batch, ATTENTION, cos_sin=table[batch.positions], interleaved=True)
    angles = batch.positions[:, None].double() * torch.tensor([1.0, 0.3, 0.01]).double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for before, found in ((q, found_q), (k, found_k)):
        pairs = torch.view_as_complex(before[..., :6].double().unflatten(-1, (3, 2)).contiguous())
        expected = torch.cat((torch.view_as_real(pairs * turn).flatten(-2), before[..., 6:].double()), -1)
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rotation_may_leave_the_end_of_a_head_alone():
    batch = make_batch([(2, 8)])
    table = rotary_table(RotarySpec(inverse_frequencies=(1.0, 0.1)), 10, torch.device("cpu"))
    qkv = torch.randn(2, ATTENTION.qkv_size)
    before, _, _ = split(qkv, ATTENTION)
    found, _, _ = run_rotation(qkv, batch, ATTENTION, cos_sin=table[batch.positions])
    assert torch.equal(found[..., 4:], before[..., 4:])
    assert not torch.equal(found[..., :4], before[..., :4])
    torch.testing.assert_close(found.norm(dim=-1), before.norm(dim=-1))


def test_without_positions_nothing_is_turned():
    batch = make_batch([(1, 6), (4, 8)])
    qkv = torch.randn(5, ATTENTION.qkv_size)
    for found, before in zip(run_rotation(qkv, batch, ATTENTION), split(qkv, ATTENTION), strict=True):
        assert torch.equal(found, before)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_queries_and_keys_are_normalized_each_head_alone(dtype):
    batch = make_batch([(1, 6), (4, 8)])
    spec = dataclasses.replace(ATTENTION, qk_norm=NormSpec(kind="rms", eps=1e-5))
    qkv = torch.randn(5, spec.qkv_size).mul(3).to(dtype)
    q_norm, k_norm = torch.rand(20).to(dtype), torch.rand(20).to(dtype)
    q, k, v = split(qkv, spec)
    found_q, found_k, found_v = run_rotation(qkv, batch, spec, q_norm=q_norm, k_norm=k_norm)
    for before, weight, found in ((q, q_norm, found_q), (k, k_norm, found_k)):
        expected = before.double() / (before.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(found_v, v)


# --------------------------------------------------------------------------------------- norms, activations, products


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 8), (5, 72), (3, 1000)])
@pytest.mark.parametrize("kind", ["rms", "unit offset", "layer", "plain layer"])
def test_norm_adds_the_residual_last(dtype, shape, kind):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    spec = NormSpec(
        kind="layer" if "layer" in kind else "rms",
        eps=1e-5,
        unit_offset=kind == "unit offset",
        affine="plain" not in kind,
    )
    for after in (residual, None):
        wide = x.double()
        if spec.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        if spec.affine:
            expected = expected * (weight.double() + spec.unit_offset)
        if kind == "layer":
            expected = expected + bias.double()
        if after is not None:
            expected = expected + after.double()
        given = weight if spec.affine else None, bias if kind == "layer" else None
        found = norm(x, *given, spec, residual=after)
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def by_erf(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def by_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("silu", lambda x: x / (1 + (-x).exp())),
        ("relu", lambda x: x.clamp(min=0)),
        ("gelu", by_erf),
        ("gelu_tanh", by_tanh),
    ],
)
def test_activations_are_what_their_names_say(dtype, name, plain):
    gate, up = torch.randn(4, 33).to(dtype), torch.randn(4, 33).to(dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    found = activate(torch.cat((gate, up), 1), name, gated=True)
    torch.testing.assert_close(found.double(), plain(gate.double()) * up.double(), **tolerance)
    torch.testing.assert_close(activate(gate, name, gated=False).double(), plain(gate.double()), **tolerance)


def test_the_two_gelus_differ():
    x = torch.linspace(-3, 3, 50)
    assert (activate(x, "gelu", gated=False) - activate(x, "gelu_tanh", gated=False)).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("shape", [(5, 7), (300, 72), (64, 1000)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_weights_multiply_like_plain_ones(dtype, rows, shape, with_bias):
    weight, x = torch.randn(shape).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if with_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    scale = 2 * math.sqrt(shape[1])  # rounding errors of a sum add up like a random walk
    found = linear(x, pack_weight(weight), bias)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
