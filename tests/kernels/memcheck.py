"""Calls every kernel once per interesting shape, for compute-sanitizer to watch: no access may leave its tensor.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.kernels.memcheck [op ...]

PyTorch would put many tensors into one piece of memory, within which nobody sees an overrun; with the variable each is
a piece of its own. The shapes make an overrun leave it: nothing is a multiple of a tile, and the cache ends where a
context does. Whether results are right is tested elsewhere (test_pairs.py and its neighbours). Without a GPU the
kernels are interpreted (TRITON_INTERPRET=1), which shows that the cases are well made.

The case `overrun` reads past a tensor on purpose: if that goes unnoticed, the rest says nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.batch import Batch
from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.attention import paged_attention
from headrace.kernels.ops.dequantize import dequantize
from headrace.kernels.ops.edits import count, edit
from headrace.kernels.ops.embedding import embed
from headrace.kernels.ops.experts import experts
from headrace.kernels.ops.full_attention import full_attention
from headrace.kernels.ops.linear import linear, share_norm
from headrace.kernels.ops.linears import linear_both, linear_chain, linear_sum
from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.ops.placement import EXPECTED, place
from headrace.kernels.ops.pooling import pool
from headrace.kernels.ops.rotary import rotary_table, rotate_and_cache
from headrace.kernels.ops.rows import halve_rows, round_rows
from headrace.kernels.ops.sampling import choose
from headrace.kernels.ops.self_attention import rotate_and_attend
from headrace.kernels.quantize import SCHEMES
from headrace.kernels.spec import AttentionSpec, RotarySpec
from tests.kernels.test_edits import make_tables
from tests.kernels.test_pairs import ACTIVATIONS, CROWDS, NORMS, QK_NORMS, make_experts
from tests.kernels.test_pairs_attention import EXTRAS, make_spec
from tests.kernels.test_pairs_embedding import make as make_tokens
from tests.kernels.test_pairs_linear import AROUND, FEW, SKINNY, make
from tests.kernels.test_pairs_linears import AROUND as AROUND_BOTH
from tests.kernels.test_pairs_linears import BIASES, BOTH, MANY, SUMS, make_both, make_sum, projection, summed
from tests.kernels.test_pairs_quantized import make_narrow_experts, quantized
from tests.kernels.test_sampling_gpu import make_rows
from tests.support.batches import make_batch
from tests.support.kernels import Kernels

__all__ = ["CASES", "main"]

Case = tuple[str, Callable[[Kernels], object]]  # a name, and what to do

FLOAT, BFLOAT, HALF = DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_cases() -> Iterator[Case]:
    """Rows of a part of a tile, of one value, of one value more than a tile; no row; rows out of wider ones."""
    shapes = [*product(DTYPES, [(3, 1000)], NORMS), *product([BFLOAT], [(1, 1), (2, 4097), (0, 8)], ["rms", "layer"])]
    for dtype, shape, name in shapes:
        yield f"{name} {dtype} {shape}", lambda run, case=(dtype, shape, name): _norm(run, *case)
    yield "heads of wider rows", _norm_of_heads


def _norm(run: Kernels, dtype: torch.dtype, shape: tuple[int, int], name: str) -> None:
    spec = NORMS[name]
    weight = torch.randn(shape[1]).to(dtype) if spec.affine else None
    bias = torch.randn(shape[1]).to(dtype) if name == "layer" else None
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    run(norm, x, weight, bias, spec)
    run(norm, x, weight, bias, spec, residual=residual)


def _norm_of_heads(run: Kernels) -> None:
    rows = torch.randn(3, 5, 33).to(run.device)
    run(norm, rows[:, 2:], torch.randn(33), None, NORMS["rms"])


def linear_cases() -> Iterator[Case]:
    """Parts of tiles in each direction, depths in parts, one row and many, no row; all that comes before and after."""
    plain = [*product([HALF], [*FEW, *SKINNY, (0, 10, 72)], ["all"]), *product([FLOAT], FEW[:2], AROUND)]
    for scheme, case in [*product([None], plain), *product(SCHEMES, product([HALF], [*FEW, *SKINNY], ["all"]))]:
        given = make(*case) if scheme is None else quantized(make(*case), scheme)[0]
        arguments = [given.pop(name) for name in ("x", "weight", "bias")]
        name = f"{case} {scheme or ''}"
        yield name, lambda run, arguments=arguments, given=given: run(linear, *arguments, **given)


def linear_both_cases() -> Iterator[Case]:
    """Likewise; the first is the larger one, and the second."""
    for case in [
        *product([HALF], [*BOTH, *MANY, (0, 10, 5, 72)], AROUND_BOTH[3:5]),
        *product([FLOAT], BOTH[:1], AROUND_BOTH),
    ]:
        first, second = make_both(*case)
        arguments = first["x"], projection(first), projection(second)
        yield str(case), lambda run, arguments=arguments: run(linear_both, *arguments)


def linear_sum_cases() -> Iterator[Case]:
    """Likewise, of two depths; with and without biases."""
    for case in product(DTYPES, [*SUMS, (5, 33, 128, 600), (0, 10, 72, 40)], [BIASES[0], BIASES[3]]):
        given, _ = make_sum(*case)
        arguments, residual = summed(given), given["residual"]
        yield str(case), lambda run, given=(arguments, residual): run(linear_sum, *given[0], residual=given[1])


def linear_chain_cases() -> Iterator[Case]:
    """Of fp8, whose rows are rounded between the two."""
    for dtype, rows in product(DTYPES, (65, 70)):
        first, _ = quantized(make(dtype, (rows, 64, 48), "rms"), "fp8")
        second, _ = quantized(make(dtype, (rows, 32, 32), "residual"), "fp8")
        given = first["x"], projection(first)._replace(activation="silu", gated=True), projection(second)
        yield f"{dtype} {rows} rows", lambda run, given=given: run(linear_chain, *given)


def dequantize_cases() -> Iterator[Case]:
    """Rows of part of a tile, of several; few of them and many."""
    for scheme, dtype, shape in product(SCHEMES, DTYPES, [(5, 1030), (1, 16), (70, 129)]):
        made, _ = quantized({"weight": torch.randn(shape, dtype=dtype)}, scheme)
        given = made["weight"], made["scale"], dtype
        yield f"{scheme} {dtype} {shape}", lambda run, given=given: run(dequantize, *given)


def halve_rows_cases() -> Iterator[Case]:
    """Parts of a tile and whole ones, with and without norms; one row, several and none."""
    for scheme, (name, x, before) in product(SCHEMES.values(), _rows()):
        yield f"{scheme.name} {name}", lambda run, args=(x, scheme.dtype, before): run(halve_rows, *args)


def round_rows_cases() -> Iterator[Case]:
    """Likewise."""
    for name, x, before in _rows():
        yield name, lambda run, args=(x, before): run(round_rows, *args)


def _rows() -> Iterator[tuple[str, torch.Tensor, NormWeights | None]]:
    for dtype, shape, name in product(DTYPES, [(3, 1001), (1, 16), (0, 40)], ["plain", "layer", "rms"]):
        given = make(dtype, (shape[0], 4, shape[1]), name)
        yield f"{dtype} {shape} {name}", given["x"], given.get("before")


def share_norm_cases() -> Iterator[Case]:
    """One row, and several."""
    for dtype, rows in product(DTYPES, (1, 3)):
        given = make(dtype, (rows, 10, 1001), "layer")
        yield f"{dtype} {rows} rows", lambda run, given=given: run(share_norm, given["x"], given["before"])


def activate_cases() -> Iterator[Case]:
    """Parts of a tile, several tiles and a part of one; one row, and none."""
    for dtype, name, gated, (rows, size) in [
        *product([FLOAT], ACTIVATIONS, [True, False], [(3, 33)]),
        *product([BFLOAT, HALF], ["silu"], [True, False], [(1, 2600), (0, 8)]),
    ]:
        x = torch.randn(rows, size * (2 if gated else 1)).to(dtype)
        name_of_case = f"{name} {dtype} {'gated' if gated else 'plain'} {(rows, size)}"
        yield name_of_case, lambda run, x=x, name=name, gated=gated: run(activate, x, name, gated=gated)


def choose_cases() -> Iterator[Case]:
    """Vocabularies short of a tile, one more than a tile, in parts; one row and many; filters that list few tokens,
    many, and more than the list holds; no settings."""
    for size, vocab, dtype, settings in [
        (1, 5, FLOAT, {}),
        (1, 1025, BFLOAT, {"temperature": 0.5}),
        (3, 20_003, HALF, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}),
        (3, 20_003, FLOAT, {"top_k": 3000}),
        (3, 20_003, BFLOAT, {"top_p": 0.9}),
        (7, 1001, FLOAT, {"min_p": 0.05}),
        (300, 1001, BFLOAT, {"top_p": 0.5}),
    ]:
        arguments = torch.randn(size, vocab).to(dtype), make_rows(size, **settings)
        yield f"{size} rows of {vocab}, {dtype}, {settings}", lambda run, arguments=arguments: run(choose, *arguments)
    alike = torch.zeros(3, 20_003)
    yield "all alike", lambda run: run(choose, alike, make_rows(3, top_k=100, top_p=0.5))
    yield "all greedy", lambda run: run(choose, alike)


def embed_cases() -> Iterator[Case]:
    """Rows short of a part, of several and a part of one; the last row of each table, and rows behind it; no token."""
    for case in [*product(DTYPES, [3], [33, 2600], ["", "scale-positions-segments"]), (HALF, 0, 33, "positions")]:
        arguments, given = make_tokens(*case)
        arguments[0][:2] = torch.tensor([49, 50])[: len(arguments[0])]
        yield str(case), lambda run, arguments=arguments, given=given: run(embed, *arguments, **given)


def edit_cases() -> Iterator[Case]:
    """Vocabularies short of a tile and of several; lists short of a loop's part and of several; the last row last."""
    for vocab, dtype, seen in [*product([5, 2050], DTYPES, [True]), (2050, BFLOAT, False)]:
        arguments = torch.randn(5, vocab).to(dtype), make_tables(vocab, seen=seen), torch.tensor([1, 2, 0, 0, 3])
        positions = torch.arange(5)
        name = f"{vocab} {dtype}, penalties: {seen}"
        yield name, lambda run, arguments=arguments, positions=positions: run(edit, *arguments, positions)


def count_cases() -> Iterator[Case]:
    """The first token of the first row, the last of the last, and none, in every order."""
    tables = make_tables(50)
    for chosen, rows in product([(49, -1, 0), (-1, 0, 49)], [(3, 0, 1), (0, 1, 3), (1, 3, 0)]):
        arguments = torch.tensor(chosen), tables, torch.tensor(rows)
        yield f"{chosen} of rows {rows}", lambda run, arguments=arguments: run(count, *arguments)


def experts_cases() -> Iterator[Case]:
    """Few tokens of an expert and many; experts that nobody asks, and one that all do; no token."""
    for dtype, crowd, activation, gated in [
        *product(DTYPES, [CROWDS[1]], ["silu"], [True]),
        *product([BFLOAT], [CROWDS[0], CROWDS[2], (0, 40, 24, 4, 2)], ["gelu"], [False]),
        *product([HALF], [(300, 72, 104, 60, 4)], ["silu"], [True]),
    ]:
        arguments = make_experts(dtype, crowd, activation, gated)
        yield f"{dtype} {crowd} {activation} {gated}", lambda run, arguments=arguments: run(experts, *arguments)
    x, chosen, *rest = make_experts(BFLOAT, CROWDS[1], "silu", True)
    last = torch.full_like(chosen, CROWDS[1][3] - 1)
    yield "all ask the last", lambda run: run(experts, x, last, *rest)
    narrow, scales = make_narrow_experts("int8", BFLOAT, CROWDS[1], "silu", True)
    yield "in 8 bits", lambda run: run(experts, *narrow, **scales)


# (heads, kv heads, head dim, pairs that turn)
ROTATED = [(6, 2, 20, 10), (5, 1, 64, 0), (32, 32, 80, 16), (3, 1, 256, 128)]


def rotate_and_cache_cases() -> Iterator[Case]:
    """One token and several, parts of heads that turn, norms of heads; the last slot of the cache is written."""
    for dtype, heads, interleaved, name, tokens in [
        *product(DTYPES, ROTATED, [False], ["no-norm"], [7]),
        *product([BFLOAT], ROTATED, [True], ["rms"], [1]),
        *product([HALF], ROTATED[:1], [True, False], ["unit-offset", "layer"], [3]),
        (FLOAT, ROTATED[0], False, "no-norm", 0),
    ]:
        layout = "interleaved" if interleaved else "halves"
        case = (dtype, heads, interleaved, name, tokens)
        yield f"{dtype} {heads} {layout} {name} {tokens} tokens", lambda run, case=case: _rotate(run, *case)


def _rotate(
    run: Kernels, dtype: torch.dtype, heads: tuple[int, int, int, int], interleaved: bool, name: str, tokens: int
) -> None:
    num_heads, num_kv_heads, head_dim, pairs = heads
    qk_norm = QK_NORMS[name]
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=1.0, qk_norm=qk_norm)
    keys, values = (torch.zeros(40, num_kv_heads, head_dim, dtype=dtype, device=run.device) for _ in range(2))
    slots = torch.arange(39, 39 - tokens, -1)
    settings: dict[str, Any] = {"interleaved": interleaved}
    if pairs:
        rotary = RotarySpec(inverse_frequencies=tuple(0.9**n for n in range(pairs)))
        settings["cos_sin"] = rotary_table(rotary, 100, torch.device("cpu"))[100 - tokens :]
    if qk_norm is not None and qk_norm.affine:
        settings |= {weight: torch.rand(head_dim).to(dtype) for weight in ("q_norm", "k_norm")}
    run(rotate_and_cache, torch.randn(tokens, spec.qkv_size).to(dtype), slots, keys, values, spec, **settings)


# Decodes with contexts of one token, that end in a tile, on its edge and after it, in many parts and in one; prompts
# at once and in chunks. The longest is last, where the table of blocks ends.
LENS = {
    "token": [(1, 1)],
    "decodes": [(1, 64), (1, 1), (1, 65), (1, 333)],
    "long decode": [(1, 5001)],
    "prompts": [(3, 3), (65, 100)],
    "mixed": [(1, 33), (1, 130), (9, 9), (70, 133)],
}
USUAL = (6, 2, 20)
HEADS = [(8, 8, 64), (12, 4, 80), (9, 1, 96), (8, 2, 128), (4, 2, 256)]


def paged_attention_cases() -> Iterator[Case]:
    """Every head size, every tile, everything that is added to scores, every way to cut a context into blocks.

    Most of the time goes to compiling, so cases are chosen, not multiplied.
    """
    for case in [
        *product([HALF], HEADS, ["mixed"], [16], ["plain"]),
        *product([FLOAT], [HEADS[0], HEADS[-1]], ["mixed"], [16], ["plain"]),
        *product([HALF], [USUAL], ["mixed"], [16], EXTRAS),
        *product([BFLOAT], [USUAL], LENS, [16], ["plain"]),
        *product([BFLOAT], [USUAL], ["mixed"], [1, 5, 128], ["window"]),
        (BFLOAT, (71, 1, 64), "mixed", 16, "plain"),
    ]:
        yield " ".join(map(str, case)), lambda run, case=case: _paged(run, *case)


def _paged(
    run: Kernels, dtype: torch.dtype, heads: tuple[int, int, int], lens_name: str, block_size: int, extra: str
) -> None:
    spec = make_spec(heads, extra)
    lens = LENS[lens_name]
    num_blocks = 8 * -(-max(context for _, context in lens) // block_size)
    scattered = make_batch(lens, block_size=block_size, num_blocks=num_blocks)
    q_thd = torch.randn(len(scattered.positions), spec.num_heads, spec.head_dim).to(dtype)
    table = torch.randn(32, spec.num_heads).to(dtype) if spec.relative else None
    for row in range(len(lens)):
        batch, num_slots = _ending_with(scattered, row)
        keys, values = (torch.randn(num_slots, spec.num_kv_heads, spec.head_dim).to(dtype) for _ in range(2))
        run(paged_attention, q_thd, keys, values, batch, spec, table)


def rotate_and_attend_cases() -> Iterator[Case]:
    """Decodes alone: every head size, every tile, everything that is added to scores; the last slot is written."""
    for case in [
        *product([HALF], HEADS, ["decodes"], ["plain"], ["no-norm"]),
        *product([HALF], [USUAL], ["decodes"], [extra for extra in EXTRAS if extra != "cross"], ["rms"]),
        *product([BFLOAT], [USUAL], ["token", "long decode"], ["plain"], ["unit-offset"]),
        (FLOAT, HEADS[-1], "decodes", "plain", "layer"),
        (BFLOAT, (71, 1, 64), "decodes", "plain", "no-norm"),
    ]:
        yield " ".join(map(str, case)), lambda run, case=case: _rotate_and_attend(run, *case)


def _rotate_and_attend(
    run: Kernels, dtype: torch.dtype, heads: tuple[int, int, int], lens_name: str, extra: str, norm_name: str
) -> None:
    spec = dataclasses.replace(make_spec(heads, extra), qk_norm=QK_NORMS[norm_name])
    lens = LENS[lens_name]
    scattered = make_batch(lens, block_size=16, num_blocks=8 * -(-max(context for _, context in lens) // 16))
    qkv = torch.randn(len(lens), spec.qkv_size).to(dtype)
    table = torch.randn(32, spec.num_heads).to(dtype) if spec.relative else None
    settings: dict[str, Any] = {"cos_sin": torch.randn(len(lens), 2, spec.head_dim // 2)}
    if spec.qk_norm is not None and spec.qk_norm.affine:
        settings |= {weight: torch.rand(spec.head_dim).to(dtype) for weight in ("q_norm", "k_norm")}
    for row in range(len(lens)):
        batch, num_slots = _ending_with(scattered, row)
        ends = torch.tensor(batch.context_lens_host) - 1
        slots = batch.block_tables.long().gather(1, ends[:, None] // 16)[:, 0] * 16 + ends % 16
        batch = dataclasses.replace(batch, slots=slots)
        keys, values = (torch.randn(num_slots, spec.num_kv_heads, spec.head_dim).to(dtype) for _ in range(2))
        run(rotate_and_attend, qkv, batch, keys, values, spec, table, **settings)


def _ending_with(batch: Batch, row: int) -> tuple[Batch, int]:
    """The batch with its blocks renumbered so that a row's context ends the cache, and the slots that the cache has."""
    context, size = batch.context_lens_host[row], batch.block_size
    tables = batch.block_tables.long()
    last, highest = tables[row, (context - 1) // size], tables.max()
    swapped = tables.masked_fill(tables == last, highest).masked_fill(tables == highest, last)
    num_slots = int(highest) * size + (context - 1) % size + 1
    return dataclasses.replace(batch, block_tables=swapped.int()), num_slots


def full_attention_cases() -> Iterator[Case]:
    """Texts of one token, of a part of a tile, of several; with and without a relative bias."""
    for dtype, heads, extra in [
        *product(DTYPES, [(12, 12, 64)], ["plain", "relative"]),
        *product([HALF], [*HEADS[1:], USUAL], ["plain"]),
    ]:
        yield f"{dtype} {heads} {extra}", lambda run, case=(dtype, heads, extra): _full(run, *case)


def _full(run: Kernels, dtype: torch.dtype, heads: tuple[int, int, int], extra: str) -> None:
    spec = dataclasses.replace(make_spec(heads, extra), causal=False)
    table = torch.randn(32, spec.num_heads).to(dtype) if spec.relative else None
    for lens in ((1,), (70, 1, 33, 5)):
        batch = make_batch([(length, length) for length in lens], num_blocks=512)
        run(full_attention, torch.randn(sum(lens), spec.qkv_size).to(dtype), batch, spec, table)


def pool_cases() -> Iterator[Case]:
    """Texts of one state, of several tiles, of none in between and at the end; columns of a part of a tile."""
    for dtype, size in product(DTYPES, (1, 37, 64)):
        states, starts = torch.randn(141, size).to(dtype), torch.tensor([0, 1, 1, 70, 141, 141], dtype=torch.int32)
        yield f"{dtype} {size}", lambda run, arguments=(states, starts): run(pool, *arguments)


def overrun_cases() -> Iterator[Case]:
    """What must be noticed: the first value after a tensor is read."""

    def overrun(run: Kernels) -> None:
        x, out = torch.ones(100, device=run.device), torch.empty(1, device=run.device)
        _sum[(1,)](x, out, len(x) + 1, BLOCK=128)
        out.cpu()  # waits for it

    yield "one value too many", overrun


@triton.jit
def _sum(x, out, size, BLOCK: tl.constexpr):  # noqa: N803  # constants of a kernel are written in capitals
    place = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + place, mask=place < size, other=0.0), axis=0))


def place_cases() -> Iterator[Case]:
    """The last entry of the last row's table, and none that is expected beyond its row."""
    for num_rows, width in [(1, 1), (2, 1), (3, 5), (5, 16), (4, 1500), (2, 1024)]:
        rows = torch.arange(num_rows).flip(0)
        tables, last_tokens = torch.ones(num_rows, width, dtype=torch.int32), torch.arange(num_rows)
        tokens, positions = torch.full((num_rows,), EXPECTED), torch.full((num_rows,), width * 16 - 1)
        arguments = tokens, positions, rows, tables, last_tokens, 16
        yield f"{num_rows} tables of {width}", lambda run, arguments=arguments: run(place, *arguments)


# op -> its cases
CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "activate": activate_cases,
    "choose": choose_cases,
    "count": count_cases,
    "edit": edit_cases,
    "embed": embed_cases,
    "experts": experts_cases,
    "full_attention": full_attention_cases,
    "linear": linear_cases,
    "linear_both": linear_both_cases,
    "linear_sum": linear_sum_cases,
    "linear_chain": linear_chain_cases,
    "dequantize": dequantize_cases,
    "halve_rows": halve_rows_cases,
    "round_rows": round_rows_cases,
    "norm": norm_cases,
    "paged_attention": paged_attention_cases,
    "place": place_cases,
    "pool": pool_cases,
    "rotate_and_attend": rotate_and_attend_cases,
    "rotate_and_cache": rotate_and_cache_cases,
    "share_norm": share_norm_cases,
}


def main(wanted: list[str]) -> None:
    """Run the cases of some ops, by default of all but the overrun; says which one it is at."""
    torch.manual_seed(0)
    if torch.cuda.is_available() and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        raise SystemExit("Set PYTORCH_NO_CUDA_MEMORY_CACHING=1; without it overruns stay inside PyTorch's own memory.")
    run = Kernels("cuda" if torch.cuda.is_available() else "interpreted")
    count = 0
    for op in wanted or CASES:
        for name, do in (overrun_cases if op == "overrun" else CASES[op])():
            print(f"{op}: {name}", flush=True)
            do(run)
            count += 1
    print(f"{count} cases ran")


if __name__ == "__main__":
    main(sys.argv[1:])
