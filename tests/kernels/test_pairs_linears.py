"""Kernels of two products at a time against their reference: of one input, with all that may come before and after
each, and to one sum. Exact values and bounds are those of one product (test_pairs_linear.py)."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

from headrace.kernels.ops.linears import Projection, linear_both, linear_sum
from headrace.kernels.tuning import GEMV_ROWS
from tests.kernels.test_pairs import DTYPES
from tests.kernels.test_pairs_linear import check, exactly, make
from tests.support.kernels import Kernels, cases

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# (rows, out, other out, in): one row and few, parts of tiles of both, the first larger and the second; a single column;
# one row that is kept; and more rows than one launch is made for.
BOTH = [(1, 10, 70, 1100), (3, 133, 33, 600), (4, 16, 64, 512), (2, 1, 5, 40), (1, 210, 330, 150)]
MANY = [(GEMV_ROWS + 1, 33, 40, 128), (70, 24, 16, 72)]
# (rows, out, in, other in): likewise; depths of one part of a tile, and of several.
SUMS = [(1, 10, 1100, 600), (3, 33, 96, 1300), (4, 16, 512, 512), (2, 1, 40, 8)]
# Falcon-7B, GPT-J, Pythia 1.4B; and what no tile divides.
GPU_BOTH = [(1, 4672, 18176, 4544), (1, 12288, 16384, 4096), (4, 6144, 8192, 2048), (2, 1111, 3333, 1601)]
GPU_SUMS = [(1, 4544, 18176, 4544), (1, 4096, 16384, 4096), (4, 2048, 8192, 2048), (2, 1111, 3333, 1601)]

# What is around the two, as in test_pairs_linear.py: alike, biases and activations of one, one gated, a norm that both
# kernels know, with a scale or without; and norms that one launch does not take.
AROUND = [
    ("plain", "plain"),
    ("plain", "bias"),
    ("bias", "gelu"),
    ("layer", "layer"),
    ("rms", "gated"),
    ("plain-layer", "plain-layer"),
    ("unit-offset", "unit-offset"),
]
APART = [("rms", "layer"), ("plain", "rms"), ("layer", "plain")]


def make_both(dtype: torch.dtype, shape: tuple[int, int, int, int], around: tuple[str, str]) -> tuple[dict, dict]:
    """Arguments of both products, of one input."""
    rows, out, other_out, size = shape
    first, second = (
        make(dtype, (rows, height, size), "bias" if name == "gelu" else name)
        for height, name in zip((out, other_out), around, strict=True)
    )
    if around[1] == "gelu":
        second["activation"] = "gelu"
    return first, second | {"x": first["x"]}


def projection(given: dict) -> Projection:
    return Projection(**{name: value for name, value in given.items() if name in Projection._fields})


def compute_both(kernels: Kernels, first: dict, second: dict) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = kernels(linear_both, first["x"], projection(first), projection(second))
    return found


@cases(
    [*product([HALF], BOTH, AROUND[3:5]), *product(DTYPES, BOTH[:1], AROUND), *product([HALF], MANY, AROUND[:2])],
    [*product(DTYPES, BOTH, AROUND), *product([BFLOAT, HALF], GPU_BOTH, AROUND), *product([HALF], MANY, AROUND)],
)
def test_two_products_of_one_input(kernels: Kernels, case):
    first, second = make_both(*case)
    for found, given in zip(compute_both(kernels, first, second), (first, second), strict=True):
        check(found, given)


@cases(product([HALF], BOTH[:1], APART))
def test_norms_that_one_launch_does_not_take(kernels: Kernels, case):
    first, second = make_both(*case)
    for found, given in zip(compute_both(kernels, first, second), (first, second), strict=True):
        check(found, given)


@cases(["a norm nobody folded", "every other row", "no rows"])
def test_both_of_what_is_not_as_it_might_be(kernels: Kernels, case):
    first, second = make_both(HALF, (3, 40, 24, 96), ("layer", "layer"))
    if case == "a norm nobody folded":
        second["folded"] = None
    elif case == "every other row":
        first["x"] = second["x"] = torch.randn(6, 96).half()[::2]
    else:
        first["x"] = second["x"] = first["x"][:0]
    for found, given in zip(compute_both(kernels, first, second), (first, second), strict=True):
        check(found, given)


def make_sum(dtype: torch.dtype, shape: tuple[int, int, int, int], biases: str) -> tuple[dict[str, Any], dict]:
    """Arguments of the op, and those of the one product of which the depths are those of both."""
    rows, out, size, other_size = shape
    first, second = (make(dtype, (rows, out, depth), "residual") for depth in (size, other_size))
    bias, other_bias = (torch.randn(out).to(dtype) if name in biases else None for name in ("first", "second"))
    given = {
        "x": first["x"],
        "weight": first["weight"],
        "bias": bias,
        "other": second["x"],
        "other_weight": second["weight"],
        "other_bias": other_bias,
        "residual": first["residual"],
    }
    added = [value.double() for value in (bias, other_bias) if value is not None]
    one = first | {
        "x": torch.cat([first["x"], second["x"]], dim=1),
        "weight": torch.cat([first["weight"], second["weight"]], dim=1),
        "bias": sum(added[1:], added[0]) if added else None,
    }
    return given, one


def compute_sum(kernels: Kernels, given: dict[str, Any]) -> torch.Tensor:
    residual = given["residual"].clone()  # it is lost
    found: torch.Tensor = kernels(linear_sum, *summed(given), residual=residual)
    return found


def summed(given: dict[str, Any]) -> tuple[torch.Tensor, Projection, torch.Tensor, Projection]:
    """Arguments of the op but the residual."""
    first, second = (Projection(given[f"{which}weight"], given[f"{which}bias"]) for which in ("", "other_"))
    return given["x"], first, given["other"], second


BIASES = ["none", "first", "second", "first and second"]


@cases(
    [*product([HALF], SUMS, BIASES), *product(DTYPES, SUMS[:2], BIASES[3:])],
    [*product(DTYPES, SUMS, BIASES), *product([BFLOAT, HALF], GPU_SUMS, BIASES)],
)
def test_the_sum_of_two_products(kernels: Kernels, case):
    given, one = make_sum(*case)
    check(compute_sum(kernels, given), one)


@cases(product([HALF], [(rows, 33, 128, 600) for rows in (GEMV_ROWS + 1, 70)], BIASES))
def test_the_sum_of_many_rows(kernels: Kernels, case):
    given, one = make_sum(*case)
    check(compute_sum(kernels, given), one)


@cases(["every other row", "part of a row", "residual of wider rows", "no rows"])
def test_a_sum_of_what_is_not_as_it_might_be(kernels: Kernels, case):
    given, one = make_sum(HALF, (3, 40, 96, 200), "first")
    if case == "every other row":
        given["x"] = torch.randn(6, 96).half()[::2]
    elif case == "part of a row":
        given["other"] = torch.randn(3, 400).half()[:, 50:250]
    elif case == "residual of wider rows":
        given["residual"] = one["residual"] = torch.randn(3, 100).half()[:, 20:60]
    else:
        given |= {name: given[name][:0] for name in ("x", "other", "residual")}
        one["residual"] = given["residual"]
    one["x"] = torch.cat([given["x"], given["other"]], dim=1)
    check(compute_sum(kernels, given), one)


@cases(["x", "other"])
def test_what_is_not_a_number_stays_in_its_row(kernels: Kernels, case):
    given, _ = make_sum(HALF, (2, 24, 300, 500), "first and second")
    expected = compute_sum(kernels, given)
    given[case][1, 7] = math.nan
    found = compute_sum(kernels, given)
    assert found[1].isnan().all()
    assert torch.equal(found[0], expected[0])


def test_references_are_those_of_one_product():
    first, second = make_both(FLOAT, (2, 6, 5, 8), ("layer", "bias"))
    for found, given in zip(linear_both(first["x"], *map(projection, (first, second))), (first, second), strict=True):
        torch.testing.assert_close(found.double(), exactly(given), rtol=1e-5, atol=1e-5)
    given, one = make_sum(FLOAT, (2, 6, 8, 5), "first and second")
    found = linear_sum(*summed(given), residual=given["residual"].clone())
    torch.testing.assert_close(found.double(), exactly(one), rtol=1e-5, atol=1e-5)
