"""The attention kernels against their references, on ragged batches over a scattered cache.

Slots that belong to nobody hold NaN: whatever reads them spoils its result. The reference is given the same narrow
numbers in float32, so that only the kernel rounds.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch

from headrace.kernels.batch import Batch
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.full_attention import full_attention
from headrace.kernels.spec import Alibi, AttentionSpec, RelativeBias
from tests.support.batches import make_batch
from tests.support.kernels import Kernels, cases, to_device

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# float32: sums over a thousand keys in another order. 16 bits: weights are rounded before they meet the values, the
# result once more, and the interpreter cuts bfloat16 off, which is a whole unit of the last digit.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2.0**-7, 2.0**-7), torch.float16: (2.0**-10, 2.0**-10)}
DTYPES = list(TOLERANCE)
NARROW = DTYPES[1:]

BUCKETS = {"relative": RelativeBias(num_buckets=32, max_distance=50)}
EXTRAS = {
    "plain": {},
    "window": {"window": 40},
    "long-window": {"window": 5000},
    "soft-cap": {"soft_cap": 1.5},
    "alibi": {"alibi": Alibi(slopes=(), scale=0.5)},
    "rounded-alibi": {"alibi": Alibi(slopes=(), rounded=True)},
    "relative": BUCKETS,
    "everything": {"window": 50, "soft_cap": 2.0, "alibi": Alibi(slopes=(), rounded=True, scale=0.7)},
    "cross": {"causal": False},
}


def make_spec(heads: tuple[int, int, int], extra: str) -> AttentionSpec:
    num_heads, num_kv_heads, head_dim = heads
    settings = dict(EXTRAS[extra])
    if "alibi" in settings:
        slopes = tuple(0.3 / (index + 1) for index in range(num_heads))
        settings["alibi"] = dataclasses.replace(settings["alibi"], slopes=slopes)
    scale = 1.3 / math.sqrt(head_dim)
    return AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=scale, **settings)


def make_cache(batch: Batch, spec: AttentionSpec, dtype: torch.dtype, num_blocks: int) -> tuple[torch.Tensor, ...]:
    """Keys and values: random where a context is, zero in the last block, which the reference reads, NaN elsewhere."""
    size = batch.block_size
    shape = ((num_blocks + 1) * size, spec.num_kv_heads, spec.head_dim)
    keys, values = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
    keys[-size:] = values[-size:] = 0
    for row, context in enumerate(batch.context_lens_host):
        positions = torch.arange(context)
        slots = batch.block_tables[row].long()[positions // size] * size + positions % size
        for cache in (keys, values):
            cache[slots] = torch.randn(context, *shape[1:]).to(dtype)
    return keys, values


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCE[dtype]
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------------ paged contexts

# Contexts that end inside a tile of 32 or 64 keys, on its edge and one after it; decodes that are cut into parts, and
# some of the parts empty; whole prompts and later chunks, of one tile of queries and of several.
LENS = {
    "token": [(1, 1)],
    "decodes": [(1, 129), (1, 1), (1, 64), (1, 65)],
    "prompts": [(3, 3), (65, 100)],
    "mixed": [(1, 33), (1, 130), (9, 9), (70, 133)],
}
GPU_LENS = {
    "long-decode": [(1, 9000)],
    "many": [(1, 1), (1, 700), (1, 1000), (1, 64), (37, 37), (300, 300), (130, 1000)],
    "long-prompts": [(1, 50), (700, 900), (1500, 1500)],  # so many queries that they get larger tiles
}
LENS |= GPU_LENS

# (heads, kv heads, head dim): groups of 3, none, all, more than a prompt's tile takes together; of no power of two.
HEADS = [(4, 4, 16), (5, 1, 64), (9, 1, 80)]
GPU_HEADS = [(8, 8, 64), (32, 32, 80), (24, 8, 96), (32, 8, 128), (16, 8, 256), (71, 1, 64), (40, 1, 128), (14, 2, 64)]
USUAL = (6, 2, 20)


@cases(
    [
        *product(DTYPES[:1], [USUAL], ["mixed"], [8], EXTRAS),
        *product(NARROW, [USUAL], ["mixed"], [8], ["plain", "everything"]),
        *product(DTYPES[:1], HEADS, ["mixed"], [8], ["plain"]),
        *product(DTYPES[:1], [USUAL], ["token", "decodes", "prompts"], [8], ["plain"]),
        *product(DTYPES[:1], [USUAL], ["mixed"], [1, 5, 128], ["plain"]),
    ],
    [
        *product(DTYPES, GPU_HEADS, ["long-decode", "many"], [16], ["plain"]),
        *product(NARROW, [(32, 8, 128), (16, 8, 256), (71, 1, 64)], ["long-prompts"], [16], ["plain", "everything"]),
        *product(DTYPES, [(32, 8, 128), (16, 8, 256), (8, 8, 64)], ["many"], [16], EXTRAS),
        *product(NARROW, [(32, 8, 128)], ["long-decode", "many"], [1, 5, 128], ["window"]),
    ],
)
def test_paged_attention(kernels: Kernels, case):
    dtype, heads, lens_name, block_size, extra = case
    spec = make_spec(heads, extra)
    lens = LENS[lens_name]
    num_blocks = 8 * -(-max(context for _, context in lens) // block_size)
    batch = make_batch(lens, block_size=block_size, num_blocks=num_blocks)
    keys, values = make_cache(batch, spec, dtype, num_blocks)
    q_thd = torch.randn(len(batch.positions), spec.num_heads, spec.head_dim).to(dtype)
    table = torch.randn(32, spec.num_heads).to(dtype) if spec.relative else None
    expected = paged_attention(
        q_thd.float(), keys.float(), values.float(), batch, spec, None if table is None else table.float()
    )
    check(kernels(paged_attention, q_thd, keys, values, batch, spec, table), expected, dtype)


@cases(DTYPES)
def test_a_source_may_be_shorter_than_what_is_asked_of_it(kernels: Kernels, case):
    spec = make_spec(USUAL, "cross")
    lens = ((1, 40), (70, 70), (3, 9))
    batch = make_batch(lens, num_blocks=256)
    keys, values = make_cache(batch, spec, case, 256)
    sources = (2, 11, 9)
    batch = dataclasses.replace(batch, context_lens=torch.tensor(sources, dtype=torch.int32), context_lens_host=sources)
    q_thd = torch.randn(74, spec.num_heads, spec.head_dim).to(case)
    expected = paged_attention(q_thd.float(), keys.float(), values.float(), batch, spec)
    check(kernels(paged_attention, q_thd, keys, values, batch, spec), expected, case)


@cases(["query", "key", "value"])
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's word for what is meant to happen
def test_what_is_not_a_number_stays_in_its_own_sequence(kernels: Kernels, case):
    spec = make_spec(USUAL, "plain")
    lens = LENS["mixed"]
    batch = make_batch(lens, num_blocks=512)
    keys, values = make_cache(batch, spec, torch.float32, 512)
    q_thd = torch.randn(len(batch.positions), spec.num_heads, spec.head_dim)
    expected = paged_attention(q_thd, keys, values, batch, spec)
    ends = batch.query_starts.tolist()
    for row in (1, 3):  # a decode in many parts, a prompt
        spoilt = [tensor.clone() for tensor in (q_thd, keys, values)]
        if case == "query":
            spoilt[0][ends[row + 1] - 1] = math.nan
        else:
            slot = int(batch.block_tables[row, 1]) * batch.block_size
            spoilt[1 if case == "key" else 2][slot] = math.nan
        found = kernels(paged_attention, *spoilt, batch, spec)
        assert found[ends[row + 1] - 1].isnan().all()
        for other in {0, 1, 2, 3} - {row}:
            tokens = slice(ends[other], ends[other + 1])
            torch.testing.assert_close(found[tokens], expected[tokens], rtol=1e-5, atol=1e-5)


@cases(["queries"])
def test_queries_may_be_part_of_a_wider_tensor(kernels: Kernels, case):
    spec = make_spec(USUAL, "plain")
    batch = make_batch([(1, 20), (4, 9)])
    keys, values = make_cache(batch, spec, torch.float32, 64)
    qkv = torch.randn(5, spec.num_heads + 4, spec.head_dim)
    queries = to_device(qkv, kernels.device)[:, : spec.num_heads]
    expected = paged_attention(qkv[:, : spec.num_heads], keys, values, batch, spec)
    check(kernels(paged_attention, queries, keys, values, batch, spec), expected, torch.float32)


# --------------------------------------------------------------------------------------------------------- whole texts


@cases(
    [
        *[(torch.float32, USUAL, "plain", (1, 33, 5, 70)), (torch.float32, USUAL, "relative", (1, 33, 5, 70))],
        (torch.bfloat16, (4, 4, 16), "relative", (1, 33, 5, 70)),
        # All tokens in one tile of columns, and one more.
        *[(torch.float16, (2, 2, 64), "plain", lens) for lens in ((1,), (128,), (63, 65), (100, 29))],
    ],
    [
        *product(DTYPES, [(16, 16, 64), (12, 4, 80), (8, 8, 128)], ["plain", "relative"], [(1, 33, 5, 70)]),
        *product(NARROW, [(16, 16, 64), (32, 8, 128)], ["plain", "relative"], [(700, 1, 500), (128,)]),
    ],
)
def test_full_attention(kernels: Kernels, case):
    dtype, heads, extra, lens = case
    spec = dataclasses.replace(make_spec(heads, extra), causal=False)
    batch = make_batch([(length, length) for length in lens], num_blocks=2048)
    qkv = torch.randn(sum(lens), spec.qkv_size).to(dtype)
    table = torch.randn(32, spec.num_heads).to(dtype) if spec.relative else None
    expected = full_attention(qkv.float(), batch, spec, None if table is None else table.float())
    check(kernels(full_attention, qkv, batch, spec, table), expected, dtype)


@pytest.mark.parametrize(("heads", "tokens", "rows"), [(16, 128, 64), (16, 527, 64), (16, 528, 128), (71, 512, 128)])
def test_tiles_are_no_larger_than_leaves_half_of_the_processors_one(monkeypatch, heads, tokens, rows):
    from headrace.kernels.ops import attend_triton

    h200 = torch.device("cuda", 0)
    monkeypatch.setattr(attend_triton, "_large_processors", lambda device: 132.0 if device == h200 else math.inf)
    assert attend_triton._tile(2, 64, heads * tokens, h200)[0] == rows
    assert attend_triton._tile(2, 64, heads * tokens, torch.device("cpu"))[0] == 64
    assert attend_triton._tile(4, 64, heads * tokens, h200)[0] == 16


# ------------------------------------------------------------------------------------------------------- only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("sequences", [1, 3, 200])
def test_a_captured_decode_serves_contexts_of_any_length(kernels: Kernels, sequences):
    spec = make_spec((32, 8, 128), "plain")
    num_slots = 64 * 1024
    keys, values = torch.randn(2, num_slots, 8, 128, device="cuda").half()
    q_thd = torch.randn(sequences, 32, 128, device="cuda").half()
    lens = torch.ones(sequences, dtype=torch.int32, device="cuda")
    tables = torch.randint(0, num_slots // 16, (sequences, 256), dtype=torch.int32, device="cuda")
    batch = Batch(
        token_ids=torch.zeros(sequences, dtype=torch.int64, device="cuda"),
        positions=torch.zeros(sequences, dtype=torch.int64, device="cuda"),
        slots=torch.zeros(sequences, dtype=torch.int64, device="cuda"),
        query_starts=torch.arange(sequences + 1, dtype=torch.int32, device="cuda"),
        context_lens=lens,
        block_tables=tables,
        num_decodes=sequences,
        query_lens=(1,) * sequences,
        context_lens_host=(1,) * sequences,
        logits_rows=torch.arange(sequences, device="cuda"),
        block_size=16,
    )
    paged_attention(q_thd, keys, values, batch, spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = paged_attention(q_thd, keys, values, batch, spec)
    for longest in (1, 17, 4096 if sequences < 10 else 300):
        lens.copy_(torch.randint(1, longest + 1, (sequences,)))
        graph.replay()
        host = dataclasses.replace(to_device(batch, "cpu"), context_lens_host=tuple(lens.tolist()))
        expected = paged_attention(q_thd.cpu().float(), keys.cpu().float(), values.cpu().float(), host, spec)
        check(found.cpu(), expected, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_other_lengths_compile_nothing(kernels: Kernels, compiled):
    spec = make_spec((9, 3, 48), "everything")
    # A prompt; decodes in parts; decodes of contexts, or in numbers, that leave nothing to cut.
    warm = [[(40, 40)], [(1, 500)], [(1, 3)]]
    others = [[(1, 17)], [(1, 1), (1, 1000), (1, 3)], [(1, 90)] * 7, [(3, 3), (65, 700)], [(1, 5), (16, 16), (2, 90)]]
    for index, lens in enumerate(warm + others):
        before = len(compiled)
        batch = make_batch(lens, block_size=16, num_blocks=512)
        keys, values = make_cache(batch, spec, torch.float16, 512)
        kernels(paged_attention, torch.randn(len(batch.positions), 9, 48).half(), keys, values, batch, spec)
        assert (len(compiled) > before) == (index < len(warm)), (lens, compiled[before:])


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_a_cache_may_have_more_values_than_32_bits_count(kernels: Kernels):
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free GPU memory")
    spec = make_spec((16, 8, 128), "plain")
    num_slots = 2**32 // 1024 + 128
    small = torch.randn(2, 256, 8, 128).half()
    keys, values = torch.empty(2, num_slots, 8, 128, dtype=torch.float16, device="cuda")
    keys[-256:], values[-256:] = small.cuda()
    batch = make_batch([(1, 100), (9, 30)], block_size=16, num_blocks=64)
    tables = torch.tensor([[0, 3, 6, 9, 12, 1, 4], [7, 10, 13, 0, 0, 0, 0]], dtype=torch.int32)
    q_thd = torch.randn(10, 16, 128).half()
    near = dataclasses.replace(batch, block_tables=tables)
    expected = paged_attention(q_thd.float(), *small.float(), near, spec)
    far = dataclasses.replace(batch, block_tables=tables + (num_slots - 256) // 16)
    check(kernels(paged_attention, q_thd, keys, values, far, spec), expected, torch.float16)
