"""`rotate_and_attend`: its kernel against the two references that it is made of.

Of a cache that has no keys and values yet for the tokens of the step: they hold NaN, as does all that is nobody's. The
reference rotates in float32 and is then given what of it the kernel's type can hold, so that both attend to the same
numbers.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import product
from typing import Any

import pytest
import torch

from headrace.kernels.batch import Batch
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.decode_tiles import decode_tiles
from headrace.kernels.ops.rotary import rotary_table, rotate_and_cache
from headrace.kernels.ops.self_attention import rotate_and_attend
from headrace.kernels.spec import AttentionSpec, RotarySpec
from tests.kernels.test_pairs import QK_NORMS, wide
from tests.kernels.test_pairs_attention import DTYPES, EXTRAS, NARROW, USUAL, check, make_cache, make_spec
from tests.support.batches import make_batch
from tests.support.kernels import Kernels, cases, to_device

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Contexts around the edges of tiles of 32 and 64 keys and of blocks of 8; one token; more tiles than there are parts,
# beside one with a single tile, so that most of its parts are empty; with prompts.
LENS = {
    "token": [(1, 1)],
    "edges": [(1, 32), (1, 33), (1, 34), (1, 1), (1, 65), (1, 66), (1, 129), (1, 8)],
    "parts": [(1, 1100), (1, 3)],
    "mixed": [(1, 33), (1, 130), (9, 9), (10, 21)],
}
GPU_LENS = {"long": [(1, 9000)], "many": [(1, 700), (1, 1), (1, 1000), (1, 64), (1, 65), (1, 4097), (1, 300), (1, 2)]}
LENS |= GPU_LENS

# (heads, kv heads, head dim, pairs that turn): no groups, of 2, 4, 8 and all; several tiles of heads, not all full; so
# many that tiles go through shared memory, with contexts in parts and whole.
HEADS = [(4, 4, 16, 8), (4, 2, 64, 16), (8, 1, 40, 20), (20, 1, 16, 0), (10, 10, 16, 8)]
GPU_HEADS = [(32, 8, 128, 64), (32, 8, 64, 32), (25, 25, 64, 0), (16, 8, 256, 128), (71, 1, 64, 32), (32, 4, 96, 48)]
GPU_HEADS += [(40, 40, 128, 64), (32, 16, 128, 64), (16, 16, 256, 0), (40, 40, 64, 32)]


# Who attends to another text caches nothing of its own.
OWN = [name for name in EXTRAS if name != "cross"]


def make_settings(spec: AttentionSpec, batch: Batch, pairs: int, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """The op's other arguments."""
    settings: dict[str, Any] = {"interleaved": layout == "interleaved"}
    if pairs:
        rotary = RotarySpec(inverse_frequencies=tuple(0.9**n for n in range(pairs)), attention_factor=1.1)
        table = rotary_table(rotary, max(batch.context_lens_host), torch.device("cpu"))
        settings["cos_sin"] = table[batch.positions]
    if spec.qk_norm is not None and spec.qk_norm.affine:
        settings |= {name: torch.rand(spec.head_dim).add(0.5).to(dtype) for name in ("q_norm", "k_norm")}
    return settings


def make_step(
    dtype: torch.dtype, heads: tuple[int, int, int, int], lens_name: str, extra: str, layout: str, norm: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the op."""
    spec = dataclasses.replace(make_spec(heads[:3], extra), qk_norm=QK_NORMS[norm])
    num_blocks = 8 * -(-max(context for _, context in LENS[lens_name]) // 8)
    batch = make_batch(LENS[lens_name], block_size=8, num_blocks=num_blocks)
    keys, values = make_cache(batch, spec, dtype, num_blocks)
    keys[batch.slots] = values[batch.slots] = math.nan
    qkv = torch.randn(len(batch.positions), spec.qkv_size).to(dtype)
    table = torch.randn(32, spec.num_heads).to(dtype) if spec.relative else None
    return (qkv, batch, keys, values, spec, table), make_settings(spec, batch, heads[3], layout, dtype)


def narrowed(x: torch.Tensor, dtype: torch.dtype, kernels: Kernels) -> torch.Tensor:
    """What a kernel makes of float32, as float32: the interpreter cuts bfloat16 off."""
    if dtype is torch.bfloat16 and kernels.device.type == "cpu":
        return (x.contiguous().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype).float()


def by_reference(arguments: tuple[Any, ...], settings: dict[str, Any], kernels: Kernels) -> tuple[torch.Tensor, ...]:
    """What is attended to, and the caches, in float32."""
    qkv, batch, keys, values, spec, table = arguments
    dtype, qkv, keys, values = qkv.dtype, *(tensor.clone().float() for tensor in (qkv, keys, values))
    exact = {name: wide(value) for name, value in settings.items()}
    q_thd = narrowed(rotate_and_cache(qkv, batch.slots, keys, values, spec, **exact), dtype, kernels)
    keys = narrowed(keys, dtype, kernels)
    return paged_attention(q_thd, keys, values, batch, spec, wide(table)), keys, values


@cases(
    [
        *product(DTYPES[:1], [(*USUAL, 10)], ["edges"], OWN, ["half"], ["no-norm"]),
        *product(NARROW, [(*USUAL, 10)], ["edges"], ["plain", "everything"], ["half"], ["rms"]),
        *product(DTYPES[:1], HEADS, ["edges"], ["plain"], ["interleaved"], ["unit-offset"]),
        *product(DTYPES[:1], [(*USUAL, 6)], ["token", "parts", "mixed"], ["plain", "window"], ["half"], ["layer"]),
    ],
    [
        *product(DTYPES, GPU_HEADS, ["edges", "parts", *GPU_LENS], ["plain"], ["half"], ["no-norm"]),
        *product(NARROW[:1], GPU_HEADS, ["many"], ["plain"], ["half", "interleaved"], QK_NORMS),
        *product(NARROW, GPU_HEADS[:3], ["many", "mixed"], OWN, ["half"], ["no-norm"]),
    ],
)
def test_rotate_and_attend(kernels: Kernels, case):
    arguments, settings = make_step(*case)
    expected, expected_keys, expected_values = by_reference(arguments, settings, kernels)
    qkv, batch, keys, values, spec, table = arguments
    keys, values = to_device((keys.clone(), values.clone()), kernels.device)
    found = kernels(rotate_and_attend, qkv.clone(), batch, keys, values, spec, table, **settings)
    check(found, expected, qkv.dtype)
    for written, wanted in ((keys, expected_keys), (values, expected_values)):
        check(written.cpu()[batch.slots], wanted[batch.slots], qkv.dtype)
        others = torch.ones(len(wanted), dtype=torch.bool)
        others[batch.slots] = False
        torch.testing.assert_close(written.cpu().float()[others], wanted[others], rtol=0, atol=0, equal_nan=True)


def layers(count: int, qkv: torch.Tensor, batch: Batch, *args: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
    """What some layers find that share a step, and the counters that it leaves."""
    found = [rotate_and_attend(qkv.clone(), batch, *args, **settings) for _ in range(count)]
    [arrivals] = [value for key, value in batch._shared.items() if key[0] == "arrivals"]
    return (*found, arrivals)


@cases(["parts"], ["long", "many"])
def test_layers_of_a_step_join_parts_alike(kernels: Kernels, case):
    """The last part sets the counter back, and who was last makes no difference."""
    arguments, settings = make_step(torch.float32, (*USUAL, 10), case, "plain", "half", "no-norm")
    count = 3 if kernels.device.type == "cpu" else 50
    first, *others, arrivals = kernels(layers, count, *arguments, **settings)
    assert not first.isnan().any()
    assert all(torch.equal(first, other) for other in others)
    assert not arrivals.any()


@cases(["query", "key", "value"])
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's word for what is meant to happen
def test_what_is_not_a_number_stays_in_its_own_sequence(kernels: Kernels, case):
    arguments, settings = make_step(torch.float32, (*USUAL, 10), "edges", "plain", "half", "no-norm")
    expected, _, _ = by_reference(arguments, settings, kernels)
    qkv, batch, keys, values, spec, table = arguments
    heads = {"query": slice(0, 6), "key": slice(6, 8), "value": slice(8, 10)}[case]
    for row in (1, 3):  # in parts, and of a single token
        spoilt = qkv.clone()
        spoilt.view(8, 10, spec.head_dim)[row, heads] = math.nan
        found = kernels(rotate_and_attend, spoilt, batch, keys.clone(), values.clone(), spec, table, **settings)
        assert found[row].isnan().all()
        others = torch.arange(8) != row
        torch.testing.assert_close(found[others], expected[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("programs", "capacity", "expected"),
    [(8, 131072, 32), (8, 128, 2), (64, 131072, 4), (128, 131072, 3), (240, 131072, 2), (300, 131072, 1), (1, 1, 1)],
)
def test_contexts_are_cut_to_fill_a_gpu_but_no_finer_than_their_tiles(programs, capacity, expected):
    assert decode_tiles(2, 128, 4, programs, capacity).splits == expected


# ------------------------------------------------------------------------------------------------------- only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("sequences", [1, 3, 64])
def test_a_captured_decode_serves_contexts_of_any_length(kernels: Kernels, sequences):
    spec = make_spec((32, 8, 128), "plain")
    size, most = 16, 4096
    num_blocks = sequences * most // size
    keys, values = torch.randn(2, (num_blocks + 1) * size, 8, 128).half().to(kernels.device)
    tables = torch.randperm(num_blocks).view(sequences, -1).int()
    lens = torch.full((sequences,), most)
    batch = make_batch([(1, 1)] * sequences, block_size=size, num_blocks=8, rows=[0] * sequences)
    batch = dataclasses.replace(
        batch,
        context_lens=lens.int(),
        slots=tables[:, -1].long() * size + size - 1,
        block_tables=tables,
        context_lens_host=(most,) * sequences,
    )
    qkv = torch.randn(sequences, spec.qkv_size).half()
    settings = make_settings(spec, dataclasses.replace(batch, positions=lens - 1), 64, "half", torch.float16)
    on_gpu, qkv_gpu, settings_gpu = to_device((batch, qkv, settings), "cuda")
    rotate_and_attend(qkv_gpu, on_gpu, keys, values, spec, **settings_gpu)
    torch.cuda.synchronize()
    captured = dataclasses.replace(on_gpu, _shared={})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            found = rotate_and_attend(qkv_gpu, captured, keys, values, spec, **settings_gpu)
    for longest in (1, 17, most):
        lens = torch.randint(1, longest + 1, (sequences,))
        slots = tables[torch.arange(sequences), (lens - 1) // size].long() * size + (lens - 1) % size
        captured.context_lens.copy_(lens)
        captured.slots.copy_(slots)
        graph.replay()
        host = dataclasses.replace(
            batch, context_lens=lens.int(), slots=slots, context_lens_host=tuple(lens.tolist()), _shared={}
        )
        arguments = (qkv, host, keys.cpu(), values.cpu(), spec, None)
        check(found.cpu(), by_reference(arguments, settings, kernels)[0], torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_other_lengths_compile_nothing(kernels: Kernels, compiled):
    spec = make_spec((9, 3, 48), "everything")
    # Decodes in parts; decodes of contexts, or in numbers, that leave nothing to cut.
    warm = [[(1, 500)], [(1, 3)]]
    others = [[(1, 17)], [(1, 1), (1, 1000), (1, 3)], [(1, 90)] * 7, [(1, 640)], [(1, 64), (1, 65)]]
    for index, lens in enumerate(warm + others):
        before = len(compiled)
        batch = make_batch(lens, block_size=16, num_blocks=512)
        keys, values = make_cache(batch, spec, torch.float16, 512)
        settings = make_settings(spec, batch, 24, "half", torch.float16)
        qkv = torch.randn(len(lens), spec.qkv_size).half()
        kernels(rotate_and_attend, qkv, batch, keys, values, spec, **settings)
        assert (len(compiled) > before) == (index < len(warm)), (lens, compiled[before:])
