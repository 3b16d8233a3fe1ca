"""Kernels of norms, activations, rotation and the cache's write against their references.

The reference is given the same narrow numbers in float32, so that only the kernel rounds. Without a GPU the kernels
are interpreted (tests/conftest.py). On a GPU: `pytest -m gpu tests/kernels`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from headrace.kernels import ops
from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.experts import experts
from headrace.kernels.ops.norm import norm
from headrace.kernels.ops.rotary import rotary_table, rotate_and_cache
from headrace.kernels.spec import Activation, AttentionSpec, ExpertsSpec, MLPSpec, NormSpec, RotarySpec
from tests.support.kernels import Kernels, cases, to_device

# float32: sums of a thousand numbers in another order. 16 bits: the result is rounded once, to 8 or 11 digits; the
# interpreter cuts bfloat16 off, which is a whole unit of the last digit.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPES = list(TOLERANCE)


def wide(value):
    """The same numbers in float32."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, slack: float = 0.0) -> None:
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] + slack)


# ------------------------------------------------------------------------------------------------------------- pairs


def paired_modules() -> list[str]:
    """Modules that hold the references of kernels."""
    folder = Path(ops.__path__[0])
    names = sorted(path.stem.removesuffix("_triton") for path in folder.glob("*_triton.py"))
    return [name for name in names if (folder / f"{name}.py").exists()]  # the others are shared by kernels


def paired_ops() -> set[str]:
    """Names of all ops that have a kernel."""
    kernels = [importlib.import_module(f"headrace.kernels.ops.{name}_triton") for name in paired_modules()]
    return {op for kernel in kernels for op in kernel.__all__}


def test_every_reference_has_a_kernel_of_the_same_signature():
    for name in paired_modules():
        kernel = importlib.import_module(f"headrace.kernels.ops.{name}_triton")
        reference = importlib.import_module(f"headrace.kernels.ops.{name}")
        for op in kernel.__all__:
            assert inspect.signature(getattr(reference, op)) == inspect.signature(getattr(kernel, op)), op
    assert paired_ops() == {
        "activate",
        "choose",
        "count",
        "dequantize",
        "edit",
        "embed",
        "experts",
        "full_attention",
        "halve_rows",
        "linear",
        "linear_both",
        "linear_chain",
        "linear_sum",
        "norm",
        "paged_attention",
        "place",
        "pool",
        "rotate_and_attend",
        "rotate_and_cache",
        "round_rows",
        "share_norm",
    }


def test_the_cpu_needs_no_triton():
    code = (
        "import sys, torch; from headrace.kernels.model import Model; "
        "from headrace.kernels.ops.activation import activate; "
        "activate(torch.zeros(1, 2), 'silu', gated=True); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "False", done.stderr


# ------------------------------------------------------------------------------------------------------------- norms

# Whole tiles and parts of them, one value, and widths for which a row takes one warp, four and sixteen.
WIDTHS = [(1, 8), (5, 72), (3, 1000)]
GPU_WIDTHS = [(1, 1), (7, 4096), (300, 5120), (2, 14336), (3, 40000)]
NORMS = {
    "rms": NormSpec(kind="rms", eps=1e-5),
    "unit-offset": NormSpec(kind="rms", eps=1e-6, unit_offset=True),
    "plain-rms": NormSpec(kind="rms", eps=1e-5, affine=False),
    "layer": NormSpec(kind="layer", eps=1e-5),
    "plain-layer": NormSpec(kind="layer", eps=1e-5, affine=False),
}


@cases(product(DTYPES, WIDTHS, NORMS), product(DTYPES, GPU_WIDTHS, NORMS))
def test_norm(kernels: Kernels, case):
    dtype, shape, name = case
    spec = NORMS[name]
    x, residual = torch.randn(shape).mul(3).add(1).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype) if spec.affine else None
    bias = torch.randn(shape[1]).to(dtype) if name == "layer" else None
    expected = norm(x.float(), wide(weight), wide(bias), spec)
    if shape[1] == 1 and spec.kind == "layer":
        expected = torch.zeros(shape) if bias is None else bias.float().expand(shape)
    check(kernels(norm, x, weight, bias, spec), expected, dtype)
    check(kernels(norm, x, weight, bias, spec, residual=residual), expected + residual.float(), dtype)


@cases(["every other row", "part of a row", "heads"])
def test_norm_of_what_is_not_contiguous(kernels: Kernels, case):
    spec = NORMS["rms"]
    if case == "every other row":
        x = torch.randn(10, 33)[::2]
    elif case == "part of a row":
        x = torch.randn(4, 100)[:, 20:53]
    else:
        x = torch.randn(3, 5, 33)[:, 1:4]
    weight = torch.randn(33)
    check(kernels(norm, x, weight, None, spec), norm(x, weight, None, spec), torch.float32)


@cases(["norm", "activate"])
def test_no_rows_are_no_error(kernels: Kernels, case):
    x = torch.empty(0, 8)
    found = (
        kernels(norm, x, torch.ones(8), None, NORMS["rms"])
        if case == "norm"
        else kernels(activate, x, "silu", gated=True)
    )
    assert found.shape == ((0, 8) if case == "norm" else (0, 4))


# ------------------------------------------------------------------------------------------------------- activations

ACTIVATIONS = ["silu", "relu", "gelu", "gelu_tanh"]
SIZES = [(4, 33), (2, 1300)]  # part of a tile; one tile and part of another
GPU_SIZES = [(1, 14336), (700, 2730)]


@cases(product(DTYPES, SIZES, ACTIVATIONS), product(DTYPES, GPU_SIZES, ACTIVATIONS))
def test_activate(kernels: Kernels, case):
    dtype, (rows, size), name = case
    x = torch.randn(rows, 2 * size).mul(4).to(dtype)
    # 1 + erf and 1 + tanh come close to 0 for negative values: what is left has lost digits.
    slack = 4e-6 if "gelu" in name else 0.0
    check(kernels(activate, x, name, gated=True), activate(x.float(), name, gated=True), dtype, 4 * slack)
    check(kernels(activate, x, name, gated=False), activate(x.float(), name, gated=False), dtype, slack)


@cases(ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's word for what is meant to happen
def test_activations_end_well_at_extremes(kernels: Kernels, case):
    x = torch.tensor([[-3e38, -1e4, -100.0, -0.0, 0.0, 1e-30, 100.0, 1e4, math.nan]])
    found = kernels(activate, x, case, gated=False)
    expected = torch.where(x > 0, x, 0.0)
    torch.testing.assert_close(found[:, :5], expected[:, :5], rtol=0, atol=1e-30)
    torch.testing.assert_close(found[:, 6:8], expected[:, 6:8])
    assert found[0, 8].isnan()


# ----------------------------------------------------------------------------------------------------------- experts

# (tokens, hidden, size, experts, experts of a token): one token; few for each expert, most of them asked; many, in
# several tiles; a number of experts that is no power of two, and of pairs that no tile divides.
CROWDS = [(1, 40, 24, 4, 2), (7, 72, 104, 5, 2), (70, 33, 50, 3, 1)]
GPU_CROWDS = [(1, 1024, 3000, 8, 2), (64, 1024, 1500, 8, 2), (300, 512, 776, 60, 4), (2000, 520, 264, 8, 2)]


def make_experts(dtype: torch.dtype, crowd: tuple[int, int, int, int, int], activation: Activation, gated: bool):
    """Arguments of the op; outputs are about as large as inputs."""
    tokens, hidden, size, count, per_token = crowd
    spec = MLPSpec(size=size, activation=activation, gated=gated, experts=ExpertsSpec(count=count, per_token=per_token))
    weights, chosen = torch.rand(tokens, count).topk(per_token, dim=-1)
    up = torch.randn(count, size * (2 if gated else 1), hidden).mul(1.5 * hidden**-0.5).to(dtype)
    down = torch.randn(count, hidden, size).mul(1.5 * size**-0.5).to(dtype)
    return torch.randn(tokens, hidden).to(dtype), chosen, weights / weights.sum(-1, keepdim=True), up, down, spec


@cases(
    [*product(DTYPES, CROWDS[1:2], ["silu"], [True]), *product(DTYPES[:1], CROWDS, ["gelu"], [True, False])],
    [*product(DTYPES, CROWDS + GPU_CROWDS, ["silu"], [True]), *product(DTYPES, GPU_CROWDS[:1], ["relu"], [False])],
)
def test_experts(kernels: Kernels, case):
    dtype = case[0]
    x, chosen, weights, up, down, spec = make_experts(*case)
    expected = experts(x.float(), chosen, weights, up.float(), down.float(), spec)
    # What is between the two products is rounded as well; and sums of so many terms, of values up to 4, in another
    # order differ by the root of their number.
    slack = 2 * TOLERANCE[dtype] + 4 * 2**-24 * spec.size**0.5
    check(kernels(experts, x, chosen, weights, up, down, spec), expected, dtype, slack)
    residual = torch.randn_like(x)
    found = kernels(experts, x, chosen, weights, up, down, spec, residual=residual)
    check(found, expected + residual.float(), dtype, slack)


@cases(["all ask one", "one is not a number"])
def test_experts_of_a_crowd(kernels: Kernels, case):
    x, chosen, weights, up, down, spec = make_experts(torch.float32, (40, 33, 50, 3, 2), "silu", True)
    chosen = torch.tensor([2, 0]).expand(40, 2) if case == "all ask one" else chosen
    expected = experts(x, chosen, weights, up, down, spec)
    if case == "one is not a number":
        x[17] = math.nan
    found = kernels(experts, x, chosen, weights, up, down, spec)
    others = torch.arange(40) != 17
    check(found[others], expected[others], torch.float32, 4e-6)
    assert bool(found[17].isnan().all()) == (case == "one is not a number")


@cases(["experts"])
def test_nobody_asks_no_expert(kernels: Kernels, case):
    x, chosen, weights, *rest = make_experts(torch.float32, (1, 40, 24, 4, 2), "silu", True)
    assert kernels(experts, x[:0], chosen[:0], weights[:0], *rest).shape == (0, 40)


# ------------------------------------------------------------------------------------------------ rotation and cache

NUM_SLOTS = 40

# (heads, kv heads, head dim, pairs that turn): groups of three, none and all; a part of the head, all of it, nothing.
HEADS = [(6, 2, 20, 10), (4, 4, 16, 3), (5, 1, 64, 0)]
GPU_HEADS = [(32, 8, 128, 64), (32, 32, 80, 16), (71, 1, 64, 32), (16, 8, 256, 128), (24, 8, 96, 48)]
QK_NORMS = {"no-norm": None, "rms": NORMS["rms"], "unit-offset": NORMS["unit-offset"], "layer": NORMS["plain-layer"]}


@cases(
    [
        *product(DTYPES, HEADS[:1], ["half", "interleaved"], ["no-norm", "rms"]),
        *product(DTYPES[:1], HEADS, ["half", "interleaved"], QK_NORMS),
    ],
    product(DTYPES, GPU_HEADS, ["half", "interleaved"], QK_NORMS),
)
def test_rotate_and_cache(kernels: Kernels, case):
    dtype, (num_heads, num_kv_heads, head_dim, pairs), layout, norm_name = case
    qk_norm = QK_NORMS[norm_name]
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=1.0, qk_norm=qk_norm)
    tokens = 7
    qkv = torch.randn(tokens, spec.qkv_size).mul(2).to(dtype)
    slots = torch.randperm(NUM_SLOTS)[:tokens]
    settings = {"interleaved": layout == "interleaved"}
    if pairs:
        table = rotary_table(
            RotarySpec(inverse_frequencies=tuple(0.9**n for n in range(pairs)), attention_factor=1.2),
            100,
            torch.device("cpu"),
        )
        settings["cos_sin"] = table[torch.randint(0, 100, (tokens,))]
    if qk_norm is not None and qk_norm.affine:
        settings |= {name: torch.rand(head_dim).to(dtype) for name in ("q_norm", "k_norm")}
    shape = (NUM_SLOTS, num_kv_heads, head_dim)

    keys, values = torch.zeros(shape), torch.zeros(shape)
    exact = {name: wide(value) for name, value in settings.items()}
    expected = rotate_and_cache(qkv.clone().float(), slots, keys, values, spec, **exact)
    found_keys, found_values = (torch.full(shape, math.nan, dtype=dtype, device=kernels.device) for _ in range(2))
    found = kernels(rotate_and_cache, qkv, slots, found_keys, found_values, spec, **settings)

    check(found, expected, dtype)
    for written, wanted in ((found_keys.cpu(), keys), (found_values.cpu(), values)):
        check(written[slots], wanted[slots], dtype)
        others = torch.ones(NUM_SLOTS, dtype=torch.bool)
        others[slots] = False
        assert written[others].isnan().all()
    assert torch.equal(found_values.cpu()[slots].flatten(1), qkv[:, -num_kv_heads * head_dim :])


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_a_cache_may_have_more_values_than_32_bits_count(kernels: Kernels):
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free GPU memory")
    spec = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=128, scale=1.0)
    num_slots = 2**32 // 1024 + 100
    keys, values = torch.empty(2, num_slots, 8, 128, dtype=torch.float16, device="cuda")
    slots = torch.tensor([5, 2**31 // 1024 + 1, num_slots - 1])
    qkv = torch.randn(3, spec.qkv_size).half()
    rotate_and_cache(*to_device((qkv, slots), "cuda"), keys, values, spec)
    _, k, v = (part.unflatten(1, (8, 128)) for part in qkv.chunk(3, dim=1))
    assert torch.equal(keys[slots.cuda()].cpu(), k)
    assert torch.equal(values[slots.cuda()].cpu(), v)
