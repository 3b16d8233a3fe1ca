"""Kernels of products with a weight in 8 bits, against the reference with the numbers that the weight stands for, in
float64: so only the kernel errs here. What quantizing costs is in test_quantize.py."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from headrace.kernels.ops.dequantize import dequantize
from headrace.kernels.ops.linear import fold_norm, linear
from headrace.kernels.ops.linears import linear_both, linear_sum
from headrace.kernels.quantize import SCHEMES, store
from headrace.kernels.tuning import Tiles
from tests.kernels.test_pairs import DTYPES
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
    scale = torch.empty(len(rows), dtype=rows.dtype)
    store(rows, values, scale)
    meant = values.double() * scale.double()[:, None]
    named = {weight: values, weight.replace("weight", "scale"): scale}
    if given.get("folded") is not None:
        named["folded"] = fold_norm(values, given["before"], scale)
    return given | named, given | {weight: meant}


@cases(
    [*product(NAMES, [HALF], FEW, ["all"]), *product(NAMES, [BFLOAT, FLOAT], FEW[:2], ["gated", "layer"])],
    [*product(NAMES, DTYPES, [*FEW, *GPU_FEW], ["all", "gated", "layer", "rms", "residual", "plain"])],
)
def test_few_rows(kernels: Kernels, case):
    scheme, *shape = case
    given, meant = quantized(make(*shape), scheme)
    check(compute(kernels, given), meant)


@cases(
    [*product(NAMES, [HALF], SKINNY, ["all"]), *product(NAMES, [BFLOAT], SKINNY[:2], ["gated"])],
    [*product(NAMES, [BFLOAT, HALF], [*SKINNY, *GPU_MANY], ["all", "gated", "plain", "residual"])],
)
def test_skinny(kernels: Kernels, case):
    scheme, *shape = case
    given, meant = quantized(make(*shape), scheme)
    check(compute(kernels, given), meant)


@cases(product(NAMES, [FLOAT], SKINNY[:2], ["all"]))
def test_float32_stays_exact(kernels: Kernels, case):
    """Tensor cores would round it."""
    scheme, *shape = case
    given, meant = quantized(make(*shape), scheme)
    check(compute(kernels, given), meant)


@cases(
    [
        *[(Tiles("gemv", 4, 512, 1), 2), (Tiles("keep", 16, 2048, 8, programs=2), 1), (Tiles("torch"), 3)],
        *[(Tiles("skinny", 64, 64, 4, 3, 3, early=True), 5), (Tiles("skinny", 16, 128, 4, 3, 8, ahead=True), 70)],
        (Tiles("skinny", 64, 128, 4, 3, 3, block_m=64), 70),
    ],
    [
        *[(Tiles("gemv", 4, 2048, 4), 1), (Tiles("gemv", 8, 512, 2), 4), (Tiles("keep", 2, 2048, 4, programs=264), 1)],
        *[(Tiles("skinny", 64, 128, 4, 4, 2, early=True), 16), (Tiles("skinny", 128, 64, 8, 4, 1, block_m=128), 256)],
        *[(Tiles("skinny", 64, 256, 4, 3, 2, ahead=True), 16), (Tiles("skinny", 32, 128, 4, 4, 3, ahead=True), 33)],
    ],
)
@pytest.mark.parametrize("scheme", NAMES)
def test_tiles_make_no_difference(kernels: Kernels, case, scheme):
    tiles, rows = case
    given, meant = quantized(make(HALF, (rows, 70, 1096), "all"), scheme)
    check(compute_with(kernels, tiles, given), meant)


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
    for each, (_, meant) in zip(found, both, strict=True):
        check(each, meant)


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
    found = kernels(dequantize, given["weight"], given["scale"])
    exact = given["weight"].double() * given["scale"].double()[:, None]
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF, FLOAT])
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_the_reference_is_the_product_with_what_is_meant(scheme, dtype, rows):
    given, meant = quantized(make(dtype, (rows, 40, 96), "all"), scheme)
    copy = {name: value for name, value in given.items() if name not in ("x", "weight", "bias", "residual")}
    found = linear(given["x"], given["weight"], given["bias"], residual=given["residual"].clone(), **copy)
    check(found, meant)
