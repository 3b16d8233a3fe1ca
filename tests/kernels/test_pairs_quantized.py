"""Kernels of products with a weight in 8 bits, against the reference with the numbers that the weight stands for, in
float64: so only the kernel errs here. What quantizing costs is in test_quantize.py."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.dequantize import dequantize
from headrace.kernels.ops.experts import experts
from headrace.kernels.ops.linear import fold_norm, linear, rounds
from headrace.kernels.ops.linears import linear_both, linear_chain, linear_sum
from headrace.kernels.ops.norm import norm
from headrace.kernels.ops.rows import halve_rows, round_rows
from headrace.kernels.quantize import SCHEMES, store
from headrace.kernels.tuning import GEMV_ROWS, MOST_ROWS, Tiles
from tests.kernels.test_pairs import CROWDS, DTYPES, GPU_CROWDS, TOLERANCE, make_experts
from tests.kernels.test_pairs import check as check_values
from tests.kernels.test_pairs_linear import FEW, SKINNY, check, compute, compute_with, make
from tests.kernels.test_pairs_linears import BOTH, SUMS, make_both, make_sum, projection, summed
from tests.support.kernels import Kernels, cases

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
NAMES = tuple(SCHEMES)
# Llama-8B, GPT-2 XL and Falcon-7B; what no tile divides; and more rows than a kernel takes, made 16-bit first.
GPU_FEW = [(1, 6144, 4096), (1, 4096, 14336), (2, 4800, 1600), (4, 4672, 4544), (3, 1111, 1601)]
GPU_MANY = [(16, 6144, 4096), (64, 4096, 14336), (129, 1024, 4096), (256, 4800, 1600), (300, 1111, 1604)]


def quantized(given: dict[str, Any], scheme: str, *, weight: str = "weight") -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments with their weight in 8 bits, and the same with the numbers for which it stands."""
    rows = given[weight]
    values = torch.empty_like(rows, dtype=SCHEMES[scheme].dtype)
    scale = torch.empty(len(rows), dtype=SCHEMES[scheme].factors or rows.dtype)
    store(rows, values, scale)
    meant = values.double() * scale.double()[:, None]
    named = {weight: values, weight.replace("weight", "scale"): scale}
    if given.get("folded") is not None:
        named["folded"] = fold_norm(values, given["before"], scale)
    return given | named, given | {weight: meant}


def check_product(kernels: Kernels, found: torch.Tensor, given: dict[str, Any], meant: dict[str, Any]) -> None:
    """With the rows that the kernel makes of x, which has tests of its own; and of so many rows that the weight becomes
    16-bit with what is left of it."""
    x, before, narrow, terms = given["x"], given.get("before"), given["weight"].dtype, 1.0
    assert found.dtype is x.dtype
    if rounds(x, given["weight"]):
        rows, factors = kernels(round_rows, x, before)
        # A library makes bfloat16 of fp8. Tensor cores add up fp8 with 14 bits, and here they do so all the way.
        rows, found, terms = rows.double() * factors.double(), found.to(BFLOAT), 3.0 + x.shape[1] / 1024
    elif GEMV_ROWS < len(x) <= MOST_ROWS and x.dtype is not FLOAT:
        halves, factors = kernels(halve_rows, x, narrow, before)
        rows = decoded(halves.double(), narrow) * factors.double()[:, None]
        terms = 1.0 if narrow is torch.int8 else 3.0  # likewise, from one end of a tile to the other
    elif len(x) > MOST_ROWS:
        check(found, meant | {"weight": meant["weight"].to(x.dtype)})
        return
    else:
        check(found, meant)
        return
    meant = {name: value for name, value in meant.items() if name not in ("before", "folded")}
    check(found, meant | {"x": rows}, found.dtype, terms=terms)


def decoded(halves: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return 256 * halves[0] + halves[1] if dtype is torch.int8 else halves[0] + halves[1] / 16


@cases(
    [*product(NAMES, [HALF], FEW, ["all"]), *product(NAMES, [BFLOAT, FLOAT], FEW[:2], ["gated", "layer"])],
    [*product(NAMES, DTYPES, [*FEW, *GPU_FEW], ["all", "gated", "layer", "rms", "residual", "plain"])],
)
def test_few_rows(kernels: Kernels, case):
    scheme, *shape = case
    given, meant = quantized(make(*shape), scheme)
    check_product(kernels, compute(kernels, given), given, meant)


@cases(
    [*product(NAMES, [HALF], SKINNY, ["all"]), *product(NAMES, [BFLOAT], SKINNY[:2], ["gated"])],
    [*product(NAMES, [BFLOAT, HALF], [*SKINNY, *GPU_MANY], ["all", "gated", "plain", "residual"])],
)
def test_skinny(kernels: Kernels, case):
    scheme, *shape = case
    given, meant = quantized(make(*shape), scheme)
    check_product(kernels, compute(kernels, given), given, meant)


# Of fp8, so many rows that they are rounded, and more than those of which products are finished by us.
ROUNDED = [(65, 48, 96), (70, 32, 1040)]


@cases(
    [*product([HALF, BFLOAT], ROUNDED, ["all", "residual", "plain"]), (FLOAT, (300, 32, 64), "all")],
    product(DTYPES, [*ROUNDED, (257, 48, 96), (256, 1600, 6400)], ["all", "gated", "residual", "bias", "plain-rms"]),
)
def test_rows_that_are_rounded(kernels: Kernels, case):
    given, meant = quantized(make(*case), "fp8")
    assert rounds(given["x"], given["weight"])
    check_product(kernels, compute(kernels, given), given, meant)


@cases(product(["int8"], [FLOAT], SKINNY[:2], ["all"]))
def test_float32_stays_exact(kernels: Kernels, case):
    """Tensor cores would round it."""
    scheme, *shape = case
    given, meant = quantized(make(*shape), scheme)
    check_product(kernels, compute(kernels, given), given, meant)


# Tiles that the table would not choose, and rows.
FEW_TILES = [(Tiles("gemv", 4, 512, 1), 2), (Tiles("keep", 16, 2048, 8, programs=2), 1), (Tiles("torch"), 3)]
TILES = [
    *[(Tiles("skinny", 64, 64, 4, 3, 3, early=True), 5), (Tiles("skinny", 16, 128, 4, 3, 8, ahead=True), 70)],
    *[(Tiles("skinny", 64, 128, 4, 3, 3, block_m=64), 70), (Tiles("skinny", 32, 64, 4, 3, 2, block_m=32), 97)],
]
GPU_FEW_TILES = [
    *[(Tiles("gemv", 4, 2048, 4), 1), (Tiles("gemv", 8, 512, 2), 4), (Tiles("keep", 2, 2048, 4, programs=264), 1)],
]
GPU_TILES = [
    *[(Tiles("skinny", 64, 128, 4, 4, 2, early=True), 16), (Tiles("skinny", 128, 64, 8, 4, 1, block_m=128), 256)],
    *[(Tiles("skinny", 64, 256, 4, 3, 2, ahead=True), 16), (Tiles("skinny", 32, 128, 4, 4, 3, ahead=True), 33)],
    *[(Tiles("skinny", 128, 128, 8, 3, 1, block_m=64), 128), (Tiles("skinny", 64, 128, 4, 4, 3, block_m=32), 250)],
]


@cases(
    product(NAMES, [*FEW_TILES, *TILES]),
    product(NAMES, [*GPU_FEW_TILES, *GPU_TILES]),
)
def test_tiles_make_no_difference(kernels: Kernels, case):
    scheme, (tiles, rows) = case
    given, meant = quantized(make(HALF, (rows, 70, 1104), "all"), scheme)
    check_product(kernels, compute_with(kernels, tiles, given), given, meant)


@cases(
    [
        *product(NAMES, [HALF], BOTH, [("layer", "layer"), ("rms", "gated")]),
        ("int8", HALF, (9, 33, 40, 128), ("bias",) * 2),
    ],
    product(NAMES, [BFLOAT], BOTH, [("layer", "layer"), ("rms", "gated"), ("bias", "gelu")]),
)
def test_two_products_of_one_input(kernels: Kernels, case):
    scheme, *shapes = case
    both = [quantized(given, scheme) for given in make_both(*shapes)]
    projections = [projection(given) for given, _ in both]
    found = kernels(linear_both, both[0][0]["x"], *projections)
    for each, (given, meant) in zip(found, both, strict=True):
        check_product(kernels, each, given, meant)


@cases(
    [*product(NAMES, [HALF], SUMS, ["first and second"]), ("int8", HALF, (9, 33, 128, 600), "first")],
    product(NAMES, [BFLOAT, FLOAT], SUMS, ["none", "first and second"]),
)
def test_the_sum_of_two_products(kernels: Kernels, case):
    scheme, *shapes = case
    given, one = make_sum(*shapes)
    given["weight"] *= 3  # so that the factors of both differ
    given, first_meant = quantized(given, scheme)
    given, second_meant = quantized(given, scheme, weight="other_weight")
    x, first, other, second = summed(given)
    first, second = first._replace(scale=given["scale"]), second._replace(scale=given["other_scale"])
    found = kernels(linear_sum, x, first, other, second, residual=given["residual"].clone())
    check(found, one | {"weight": torch.cat([first_meant["weight"], second_meant["other_weight"]], dim=1)})


@cases(product(NAMES, [HALF, BFLOAT, FLOAT], [(5, 1030), (1, 16), (70, 129)]))
def test_dequantize(kernels: Kernels, case):
    scheme, dtype, shape = case
    given, _ = quantized({"weight": torch.randn(shape, dtype=dtype)}, scheme)
    found = kernels(dequantize, given["weight"], given["scale"], dtype)
    exact = given["weight"].double() * given["scale"].double()[:, None]
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


# Of rows with a value far from the others, of zeros, of one part of a tile and several.
ROWS = [(3, 40), (5, 1100), (70, 128), (1, 4096)]


@cases(
    product([HALF, BFLOAT, FLOAT], ROWS, ["plain", "layer", "rms"]),
    product([BFLOAT], [(300, 14336), (8, 28672)], ["plain"]),
)
def test_rows_in_8_bits(kernels: Kernels, case):
    dtype, (rows, size), around = case
    given = make(dtype, (rows, 4, size), around)
    x, before = given["x"], given.get("before")
    x[0, 1] = 100.0
    x[1:2] = 0.0
    normed = x.double()
    if before is not None:
        normed = norm(normed, *(each.double() if isinstance(each, torch.Tensor) else each for each in before))
    largest = normed.abs().amax(dim=1, keepdim=True)
    slack = 1e-5 * (largest + normed.abs())  # of a norm in float32
    halves, factors = kernels(halve_rows, x, torch.int8, before)
    assert (halves.dtype, factors.dtype) == (torch.int8, FLOAT)
    error = (decoded(halves.double(), torch.int8) * factors.double()[:, None] - normed).abs()
    assert (error - largest / 65024 * 1.001 - slack).max() <= 0
    halves, factors = kernels(halve_rows, x, torch.float8_e4m3fn, before)
    assert (halves.dtype, factors.shape) == (torch.float8_e4m3fn, (rows,))
    meant = decoded(halves.double(), halves.dtype) * factors.double()[:, None]
    step = torch.maximum(normed.abs() / 256, largest / 448 / 16 * 2**-10)
    assert ((meant - normed).abs() - step * 1.001 - slack).max() <= 0
    rounded, factors = kernels(round_rows, x, before)
    assert (rounded.dtype, factors.dtype, factors.shape) == (torch.float8_e4m3fn, FLOAT, (rows, 1))
    step = torch.maximum(normed.abs() / 16, largest / 448 * 2**-10)
    error = (rounded.double() * factors.double() - normed).abs()
    assert (error - step * 1.001 - slack).max() <= 0


@cases(product([HALF, BFLOAT], [(3, 40), (70, 1100)], [("silu", True), ("gelu_tanh", False), ("relu", True)]))
def test_rows_that_are_activated(kernels: Kernels, case):
    dtype, (rows, size), (activation, gated) = case
    x = torch.randn(rows, size * (2 if gated else 1)).mul(3).to(dtype)
    found, factors = kernels(round_rows, x, activation=activation, gated=gated)
    meant = activate(x.double(), activation, gated=gated)
    largest = meant.abs().amax(dim=1, keepdim=True)
    step = torch.maximum(meant.abs() / 16, largest / 448 * 2**-10) + 1e-5 * largest
    assert ((found.double() * factors.double() - meant).abs() - step).max() <= 0


def test_a_row_of_zeros_after_its_activation_stays_one():
    rows, factors = round_rows(torch.tensor([[-1.0, -2.0, 5.0, 5.0]]), activation="relu", gated=True)
    assert (rows.float() * factors == 0).all()


@cases(
    [
        *[("fp8", BFLOAT, 70, "rms", "silu", True), ("int8", HALF, 70, "plain", "gelu", False)],
        *[("fp8", HALF, 3, "layer", "relu", False), ("fp8", HALF, 70, "layer", "gelu_tanh", False)],
    ],
    [(scheme, dtype, rows, "rms", "silu", True) for scheme in NAMES for dtype in DTYPES for rows in (1, 65, 257)],
)
def test_one_product_after_the_other(kernels: Kernels, case):
    """In one pass between them, or none: no more than roundings of rows to fp8 differs from both done alone."""
    scheme, dtype, rows, norm_name, activation, gated = case
    first, _ = quantized(make(dtype, (rows, 48 * (2 if gated else 1), 80), norm_name), scheme)
    second, _ = quantized(make(dtype, (rows, 32, 48), "residual"), scheme)
    up = projection(first)._replace(activation=activation, gated=gated)
    given = first["x"], up, projection(second)
    found = kernels(linear_chain, *given, residual=second["residual"].clone()).double()
    expected = linear_chain(*given, residual=second["residual"].clone()).double()
    assert found.isfinite().all()
    size = (expected - second["residual"].double()).norm()
    assert (found - expected).norm() <= (0.03 if rounds(first["x"], first["weight"]) else 4 * TOLERANCE[dtype]) * size


def make_narrow_experts(scheme: str, *case: Any) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    """Arguments of the op with both stacks in 8 bits, and their factors."""
    *asked, up, down, spec = make_experts(*case)
    stacks, scales = [], {}
    for name, stack in (("up_scale", up), ("down_scale", down)):
        given, _ = quantized({"weight": stack.flatten(0, 1)}, scheme)
        stacks.append(given["weight"].view(stack.shape))
        scales[name] = given["scale"].view(stack.shape[:2])
    return (*asked, *stacks, spec), scales


@cases(
    product(NAMES, [HALF], CROWDS[1:], ["silu"], [True]),
    [
        *product(NAMES, DTYPES, CROWDS + GPU_CROWDS, ["silu"], [True]),
        *product(NAMES, [BFLOAT], GPU_CROWDS[:1], ["gelu"], [False]),
    ],
)
def test_experts_in_8_bits(kernels: Kernels, case):
    """Their rows keep all digits, however many there are."""
    scheme, dtype, *shape = case
    (x, *asked, up, down, spec), scales = make_narrow_experts(scheme, dtype, *shape)
    meant = (up.float() * scales["up_scale"].float()[..., None], down.float() * scales["down_scale"].float()[..., None])
    expected = experts(x.float(), *asked, *meant, spec)
    slack = 2 * TOLERANCE[dtype] + 4 * 2**-24 * spec.size**0.5  # as in test_experts
    check_values(kernels(experts, x, *asked, up, down, spec, **scales), expected, dtype, slack)


OPS = {
    "int8": partial(halve_rows, dtype=torch.int8),
    "fp8": partial(halve_rows, dtype=torch.float8_e4m3fn),
    "rounded": round_rows,
}


@cases(OPS)
def test_rows_of_next_to_nothing_stay_numbers(kernels: Kernels, case):
    """Bug of the first draft: what makes 448 of 1e-40 is no number, and neither was what came of it."""
    x = torch.randn(3, 70)
    x[0], x[1] = 0.0, 1e-40
    rows, factors = kernels(OPS[case], x)
    meant = rows.float() * factors if case == "rounded" else decoded(rows.float(), rows.dtype) * factors[:, None]
    torch.testing.assert_close(meant, x, rtol=1 / 16, atol=0.01)
    assert meant[:2].abs().max() < 1e-30


@cases(OPS)
def test_what_is_not_a_number_stays_in_its_row(kernels: Kernels, case):
    x = torch.randn(4, 70)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    _, factors = kernels(OPS[case], x)
    assert factors.flatten().isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", OPS)
def test_references_of_rows(name):
    x = torch.randn(5, 64)
    x[1], x[2, 3] = 0.0, torch.nan
    rows, factors = OPS[name](x)
    wide = rows.float()
    if name != "rounded":
        wide = decoded(wide, rows.dtype)
    meant, kept = wide * factors.reshape(-1, 1), [0, 1, 3, 4]
    digits = {"int8": 0.0, "fp8": 1 / 256, "rounded": 1 / 16}[name]
    torch.testing.assert_close(meant[kept], x[kept], rtol=digits, atol=1e-3 if name == "int8" else 1e-2 / 4)
    assert meant[2].isnan().all()


@pytest.mark.parametrize("size", [1, 8, 24, 72, 100, 104, 127])
def test_rows_that_are_no_whole_vectors(size):
    """Bug of the first draft: PyTorch's product of bytes read beyond them, and gave noise or ended the process."""
    given, meant = quantized(make(BFLOAT, (3, 40, size), "plain"), "int8")
    for _ in range(50):
        check(linear(given["x"], given["weight"], scale=given["scale"]), meant)


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF, FLOAT])
@pytest.mark.parametrize("rows", [1, 40, 70])
def test_the_reference_is_the_product_with_what_is_meant(scheme, dtype, rows):
    given, meant = quantized(make(dtype, (rows, 48, 96), "all"), scheme)
    copy = {name: value for name, value in given.items() if name not in ("x", "weight", "bias", "residual")}
    found = linear(given["x"], given["weight"], given["bias"], residual=given["residual"].clone(), **copy)
    if rounds(given["x"], given["weight"]):
        rows, factors = round_rows(given["x"], given["before"])
        meant = {name: value for name, value in meant.items() if name not in ("before", "folded")}
        meant["x"] = rows.double() * factors.double()
    check(found, meant, dtype)
