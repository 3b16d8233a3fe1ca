"""Kernels of products with a weight against their reference, with all that may come before and after them.

The reference is given the same narrow numbers in float64, so that only the kernel rounds.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from headrace.kernels.ops.linear import fold_norm, linear, share_norm
from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.spec import Activation
from headrace.kernels.tuning import Tiles, whole_splits
from tests.kernels.test_pairs import DTYPES, NORMS, TOLERANCE
from tests.support.kernels import Kernels, cases

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# (rows, out, in): one row and few, with part of a tile in each direction, and with whole ones; a single column; one row
# that is kept; rows of which some are made up; the most that are ours, and one more.
FEW = [(1, 10, 1100), (3, 33, 600), (4, 16, 512), (2, 1, 40), (1, 210, 150)]
SKINNY = [(5, 70, 600), (17, 33, 300), (33, 64, 256), (64, 40, 129), (65, 24, 72)]
# Sizes of GPT-2 XL, Falcon-7B and T5-3B, a vocabulary that no tile divides, and offsets that 32 bits do not count.
GPU_FEW = [(1, 4800, 1600), (1, 4672, 4544), (2, 1024, 16384), (4, 50257, 1600), (1, 128256, 4096), (3, 4096, 14336)]
GPU_SKINNY = [(16, 1600, 6400), (64, 4544, 4544), (16, 128256, 4096), (48, 1024, 16384), (7, 50257, 1600)]

AROUND = {  # norm, activation, gated, bias, residual
    "plain": (None, None, False, False, False),
    "bias": (None, None, False, True, False),
    "residual": (None, None, False, False, True),
    "rms": ("rms", None, False, False, False),
    "unit-offset": ("unit-offset", None, False, True, False),
    "plain-rms": ("plain-rms", "relu", False, False, True),
    "layer": ("layer", "gelu_tanh", False, True, False),
    "plain-layer": ("plain-layer", "gelu", True, False, False),
    "gated": ("rms", "silu", True, False, False),
    "all": ("layer", "silu", True, True, True),
}


def make(dtype: torch.dtype, shape: tuple[int, int, int], around: str) -> dict:
    """Arguments of the op; outputs are about as large as inputs, and rows lie off zero."""
    name, activation, gated, has_bias, has_residual = AROUND[around]
    rows, out, size = shape
    height = out * (2 if gated else 1)
    given: dict = {
        "x": torch.randn(rows, size).mul(2).add(1).to(dtype),
        "weight": torch.randn(height, size).mul(size**-0.5).to(dtype),
        "bias": torch.randn(height).to(dtype) if has_bias else None,
        "activation": activation,
        "gated": gated,
        "residual": torch.randn(rows, out).to(dtype) if has_residual else None,
    }
    if name is not None:
        spec = NORMS[name]
        weight = torch.rand(size).add(0.5).to(dtype) if spec.affine else None
        bias = torch.randn(size).to(dtype) if name == "layer" else None
        given["before"] = NormWeights(weight, bias, spec)
        given["folded"] = fold_norm(given["weight"], given["before"])
    return given


def exactly(given: dict) -> torch.Tensor:
    """The reference in float64."""

    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    exact = {key: wide(value) for key, value in given.items() if key != "folded"}
    if exact.get("before") is not None:
        exact["before"] = NormWeights(*map(wide, exact["before"]))
        if exact["before"].spec.unit_offset:  # the reference of that one is float32
            weights, spec = exact["before"].weight + 1.0, NORMS["rms"]
            exact["x"] = torch.nn.functional.rms_norm(exact["x"], exact["x"].shape[1:], weights, 1e-6)
            assert spec.kind == "rms"
            del exact["before"]
    return linear(exact.pop("x"), exact.pop("weight"), exact.pop("bias"), **exact)


def compute(kernels: Kernels, given: dict) -> torch.Tensor:
    copy = dict(given)
    if copy.get("residual") is not None:
        copy["residual"] = copy["residual"].clone()  # it is lost
    return kernels(linear, copy.pop("x"), copy.pop("weight"), copy.pop("bias"), **copy)


def check(found: torch.Tensor, given: dict, dtype: torch.dtype | None = None, *, terms: float = 1.0) -> None:
    """The dtype is that of x, if none is given; each term of a sum may err by so many roundings to it."""
    expected = exactly(given)
    assert found.dtype is (dtype or given["x"].dtype)
    assert found.shape == expected.shape
    # What is rounded before the product (a norm on its own, more than four rows) errs in each of the terms.
    tolerance = TOLERANCE[found.dtype]
    slack = tolerance * (4 if given.get("before") is not None else terms) + 4 * 2**-24 * given["x"].shape[1] ** 0.5
    error = (found.double() - expected).abs()
    allowed = 2 * tolerance * size_of(given, expected) + slack * reach_of(given)
    torch.testing.assert_close(error / allowed, torch.zeros_like(error), rtol=0, atol=1)


def size_of(given: dict, expected: torch.Tensor) -> torch.Tensor:
    """What is rounded at the end is as large as the greater of its addends, which may cancel each other."""
    if given.get("residual") is None:
        return expected.abs()
    residual = given["residual"].double()
    return torch.maximum(expected.abs(), torch.maximum(residual.abs(), (expected - residual).abs()))


def reach_of(given: dict) -> torch.Tensor | float:
    """By how much errors of a product grow behind it: of a gate, as the up projection is large, and the other way."""
    if not given["gated"]:
        return 1.0
    plain = dict(given, activation=None, gated=False, residual=None)
    gate, up = exactly(plain).abs().chunk(2, dim=1)
    return torch.maximum(gate, up).clamp(min=1.0)


@cases(
    [*product(DTYPES, FEW[:2], ["all", "rms"]), *product(DTYPES[:1], FEW, AROUND)],
    [*product(DTYPES, FEW, AROUND), *product([BFLOAT, HALF], GPU_FEW, ["all", "gated", "rms", "residual"])],
)
def test_few_rows(kernels: Kernels, case):
    given = make(*case)
    check(compute(kernels, given), given)


@cases(
    [*product([BFLOAT, HALF], SKINNY[:2], ["gated"]), *product([HALF], SKINNY, ["plain", "all", "residual"])],
    [*product(DTYPES, SKINNY, AROUND), *product([BFLOAT, HALF], GPU_SKINNY, ["all", "gated", "plain", "residual"])],
)
def test_skinny(kernels: Kernels, case):
    given = make(*case)
    check(compute(kernels, given), given)


def run(x: torch.Tensor, tiles: Tiles, given: dict) -> torch.Tensor:
    """The kernels with tiles that the table would not choose."""
    from headrace.kernels.ops import linear_triton

    return linear_triton.run(tiles, x, **given)


def compute_with(kernels: Kernels, tiles: Tiles, given: dict) -> torch.Tensor:
    copy = dict(given)
    if copy.get("residual") is not None:
        copy["residual"] = copy["residual"].clone()
    return kernels(run, copy.pop("x"), tiles, copy)


@cases(
    [
        *[(Tiles("gemv", 4, 256, 1), 2), (Tiles("gemv", 8, 1024, 4), 4), (Tiles("skinny", 32, 64, 4, 3, 3), 2)],
        *[(Tiles("keep", 16, 2048, 8, programs=2), 1), (Tiles("keep", 4, 2048, 4, programs=100), 1)],
        *[(Tiles("skinny", 64, 64, 4, 3, 3, early=True), 5), (Tiles("skinny", 16, 128, 4, 3, 8, early=True), 70)],
        *[(Tiles("skinny", 64, 128, 4, 3, 3, block_m=64), 70), (Tiles("skinny", 32, 64, 4, 3, 1, block_m=32), 97)],
        (Tiles("skinny", 64, 128, 4, 3, 2, ahead=True, block_m=128), 128),
    ],
    [
        *[(Tiles("gemv", 16, 512, 2), 1), (Tiles("skinny", 128, 128, 8, 3, 8), 64), (Tiles("torch"), 3)],
        *[(Tiles("skinny", 16, 128, 8, 4, 2, early=True), 128), (Tiles("skinny", 32, 64, 8, 6, 1), 128)],
        *[(Tiles("skinny", 64, 128, 4, 4, 2, early=True), 16), (Tiles("skinny", 32, 256, 4, 4, 1, early=True), 16)],
        *[(Tiles("skinny", 32, 128, 4, 6, 1, block_m=32), 97), (Tiles("skinny", 64, 64, 4, 4, 4, block_m=16), 65)],
        *[(Tiles("skinny", 128, 64, 8, 4, 2, block_m=64), 128), (Tiles("skinny", 64, 128, 4, 3, 4, ahead=True), 64)],
        *[(Tiles("skinny", block_n, 64, 4, 4, 3, ahead=True, block_m=64), 128) for block_n in (16, 32, 64)],
        *[(Tiles("skinny", 128, 64, 8, 3, 1, block_m=128), 256), (Tiles("skinny", 64, 64, 4, 4, 2, block_m=64), 129)],
    ],
)
def test_tiles_make_no_difference(kernels: Kernels, case):
    tiles, rows = case
    given = make(HALF, (rows, 70, 1096), "all")
    check(compute_with(kernels, tiles, given), given)


KEPT = [(1, 70, 1096), (1, 33, 512), (1, 5, 40)]
GPU_KEPT = [(1, 4800, 1600), (1, 18176, 4544), (1, 12288, 4096), (1, 50257, 1600), (1, 14336, 4096), (1, 300, 8192)]


@cases(
    [*product([HALF], KEPT[:1], AROUND), *product(DTYPES, KEPT, ["all", "rms"])],
    [*product(DTYPES, KEPT, AROUND), *product([BFLOAT, HALF], GPU_KEPT, AROUND)],
)
def test_a_row_that_is_kept(kernels: Kernels, case):
    """All of its programs have several tiles of the weight, or but one; of the last a part may be held."""
    given = make(*case)
    _, out, size = case[1]
    depth = 1 << (size - 1).bit_length()
    for rows, programs in ((16, 3), (2, 528)) if out > 1000 else ((16, 2), (8, 1), (4, 100)):
        check(compute_with(kernels, Tiles("keep", rows, depth, 8, programs=programs), given), given)


@cases([(5, 5, 0), (5, 3, 0), (5, 2, 0), (40, 3, 16)], [(5, 8, 0), (100, 4, 64), (128, 8, 32)])
def test_the_depth_in_parts_always_adds_up_the_same(kernels: Kernels, case):
    # Thrice with the same counters, which each launch must leave as it found them.
    rows, splits, block_m = case
    given = make(HALF, (rows, 70, 600), "all")
    tiles = Tiles("skinny", 16, 64, 4, 2, whole_splits(600, 64, splits), block_m=block_m)
    found = [compute_with(kernels, tiles, given) for _ in range(3)]
    check(found[0], given)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@cases(["no rows", "no rows, gated", "every other row", "part of a row", "residual of wider rows"])
def test_of_what_is_not_as_it_might_be(kernels: Kernels, case):
    given = make(HALF, (3, 40, 96), "gated" if "gated" in case else "residual")
    if case.startswith("no rows"):
        given["x"] = given["x"][:0]
        given["residual"] = None
    elif case == "every other row":
        given["x"] = torch.randn(6, 96).half()[::2]
    elif case == "part of a row":
        given["x"] = torch.randn(3, 200).half()[:, 50:146]
    else:
        given["residual"] = torch.randn(3, 100).half()[:, 20:60]
    check(compute(kernels, given), given)


@cases(product([HALF, BFLOAT], ["rms", "layer"], [1, 7]), product([FLOAT], ["rms", "layer"], [1, 7]))
def test_what_a_norm_makes_small_may_be_large(kernels: Kernels, case):
    # Sums of squares, and values times the scale, are beyond float16.
    dtype, name, rows = case
    given = make(dtype, (rows, 24, 512), name)
    given["x"] = torch.randn(rows, 512).mul(9000).clamp(-60000, 60000).to(dtype)
    given["before"] = given["before"]._replace(weight=given["before"].weight * 20)
    given["folded"] = fold_norm(given["weight"], given["before"])
    found, expected = compute(kernels, given), exactly(given)
    assert found.isfinite().all()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 2 * TOLERANCE[dtype]


@cases(["far from zero", "first is far", "all the same"])
def test_a_layer_norm_of_what_lies_far_from_zero(kernels: Kernels, case):
    """The mean of squares less the square of the mean would be noise, were it not taken relative to a value."""
    given = make(FLOAT, (2, 24, 500), "layer")
    x = torch.randn(2, 500)
    if case == "far from zero":
        x = x + 10_000
    elif case == "first is far":
        x[:, 0] = 3000.0
    else:
        x = torch.full((2, 500), 777.7)
    given["x"] = x
    expected = exactly(given)
    torch.testing.assert_close(compute(kernels, given).double(), expected, rtol=1e-3, atol=2e-3)


@cases([1, 6])
def test_what_is_not_a_number_stays_in_its_row(kernels: Kernels, case):
    given = make(HALF, (case + 1, 24, 300), "all")
    expected = compute(kernels, given)
    given["x"][case, 7] = math.nan
    found = compute(kernels, given)
    assert found[case].isnan().all()
    assert torch.equal(found[:case], expected[:case])


@cases([1, 2])
def test_a_norm_that_several_read(kernels: Kernels, case):
    given = make(FLOAT, (case, 24, 96), "layer")
    read, before = kernels(share_norm, given["x"], given["before"])
    found = read if before is None else norm(read, *before)
    torch.testing.assert_close(found, norm(given["x"], *given["before"]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_residual_is_added_last(activation: Activation):
    x, weight, residual = torch.randn(2, 8), torch.randn(6, 8), torch.randn(2, 3)
    gate, up = (x @ weight.T).chunk(2, dim=1)
    expected = getattr(torch.nn.functional, activation)(gate) * up + residual
    found = linear(x, weight, activation=activation, gated=True, residual=residual.clone())
    torch.testing.assert_close(found, expected)
