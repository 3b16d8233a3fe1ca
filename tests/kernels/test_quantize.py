"""What it costs to keep a weight in 8 bits, by value: at most half a step; and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headrace.errors import ConfigError
from headrace.kernels.linear import Linear
from headrace.kernels.quantize import NARROW, SCHEMES, find_scheme, store
from headrace.kernels.weight import Stack
from headrace.workers.config import QUANTIZATIONS
from tests.support.quantized import blank_model

NAMES = tuple(SCHEMES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
# Of rows, by powers of two: from subnormal numbers of float16 to nearly its largest.
magnitudes = st.integers(-24, 11)


def quantized(rows: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Narrow numbers and factors of rows."""
    values = torch.empty_like(rows, dtype=SCHEMES[name].dtype)
    scale = torch.empty(len(rows), dtype=SCHEMES[name].factors or rows.dtype)
    store(rows, values, scale)
    return values, scale


def at_random(seed: int, shape: tuple[int, int], magnitude: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 2.0 ** torch.randint(-3, 4, (shape[0], 1), generator=generator)
    return (torch.randn(shape, generator=generator).clamp(-3, 3) * spread * 2.0**magnitude).to(dtype)


def half_steps(values: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
    """Of each narrow number, half the distance to the next one, in float64."""
    wide, scale = values.double(), scale.double()[:, None]
    if not SCHEMES[name].dtype.is_floating_point:
        return scale.expand_as(wide) / 2
    # A number of e4m3 has four digits; below 2**-6 they are multiples of 2**-9.
    digit = torch.floor(torch.log2(wide.abs().clamp(min=2.0**-6))) - 3
    return scale * 2.0**digit / 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)  # the first one waits for PyTorch
@given(seed=seeds, shape=shapes, magnitude=magnitudes)
def test_no_value_errs_by_more_than_half_a_step(name, dtype, seed, shape, magnitude):
    rows = at_random(seed, shape, magnitude, dtype)
    values, scale = quantized(rows, name)
    assert scale.isfinite().all()
    error = (values.double() * scale.double()[:, None] - rows.double()).abs()
    # The division is by float32, so a tie may fall to the other side by its last digits.
    assert (error <= half_steps(values, scale, name) * (1 + 2**-12)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)  # the first one waits for PyTorch
@given(seed=seeds, shape=shapes, magnitude=st.integers(-6, 11))
def test_the_factor_is_the_least_that_holds_the_largest_value(name, dtype, seed, shape, magnitude):
    rows = at_random(seed, shape, magnitude, dtype)
    values, scale = quantized(rows, name)
    widest = rows.double().abs().amax(1)
    held = scale.double() * SCHEMES[name].largest
    assert (held * (1 + 2**-23) >= widest).all(), "the largest value was clamped"  # but for rounding of float32
    assert (held <= widest * (1 + 2 * torch.finfo(scale.dtype).eps) + torch.finfo(torch.float16).tiny).all()
    assert not values.double().isnan().any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(name, dtype):
    rows = torch.zeros(3, 5, dtype=dtype)
    rows[1] = torch.tensor([0.0, -0.0, 1.0, 0.0, -3.0])
    values, scale = quantized(rows, name)
    assert not (values.double() * scale.double()[:, None])[rows == 0].any()
    assert values[1].double().any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none_and_spoils_no_other_row(name, dtype, bad):
    rows = torch.randn(3, 8, dtype=dtype)
    rows[1, 4] = bad
    values, scale = quantized(rows, name)
    assert scale.isfinite().tolist() == [True, False, True]
    product = (values.float() * scale.float()[:, None]) @ torch.ones(8)
    assert product.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_rows_so_small_that_their_factor_is_subnormal(name):
    least = 2.0**-24  # of float16
    rows = torch.tensor([[least, -least, 0.0], [300 * least, 7 * least, -least]], dtype=torch.float16)
    values, scale = quantized(rows, name)
    assert (scale > 0).all()
    error = (values.double() * scale.double()[:, None] - rows.double()).abs()
    assert (error <= half_steps(values, scale, name)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_that_were_given_stay_as_they_are(name, dtype):
    """Bug of the first draft: those of float32 were divided where they were, in a module that may still be used."""
    rows = torch.randn(3, 5, dtype=dtype)
    before = rows.clone()
    quantized(rows, name)
    assert torch.equal(rows, before)


def test_many_rows_are_as_the_same_rows_one_by_one():
    """They are taken in pieces, so that few of them are in float32 at a time."""
    rows = torch.randn(4099, 3)
    values, scale = quantized(rows, "int8")
    for index in (0, 4095, 4096, 4098):
        one, factor = quantized(rows[index : index + 1], "int8")
        assert torch.equal(one[0], values[index])
        assert factor[0] == scale[index]


# ------------------------------------------------------------------------------------------------- what has weights


@pytest.mark.parametrize("name", NAMES)
def test_the_8_bits_stay_when_the_rest_is_converted(name):
    """A cast would have made the narrow numbers 16-bit, and left the factors to multiply them once more."""
    part = Linear(6, 4, bias=True)
    part.quantize(SCHEMES[name])
    store(torch.randn(4, 6), part.weight, part.scale)
    nn.init.zeros_(part.bias)
    before = part.weight.clone()
    for convert in (nn.Module.half, nn.Module.bfloat16, lambda module: module.to(torch.float32)):
        part = convert(nn.Sequential(part))[0]
        assert part.weight.dtype is SCHEMES[name].dtype
        assert torch.equal(part.weight.view(torch.uint8), before.view(torch.uint8))
        assert part.scale.dtype is (SCHEMES[name].factors or part.bias.dtype)
    assert part.to("meta").weight.is_meta
    assert part.weight.dtype is SCHEMES[name].dtype


@pytest.mark.parametrize("name", NAMES)
def test_what_of_a_model_is_quantized(name):
    model = blank_model("qwen2", SCHEMES[name])
    narrow = {key for key, parameter in model.named_parameters() if parameter.dtype in NARROW}
    blocks = range(len(model.blocks))
    parts = ("qkv", "out", "mlp.up", "mlp.down")
    assert narrow == {f"blocks.{index}.{part}.weight" for index in blocks for part in parts} == set(model.scales())
    assert f"bias=True, {str(SCHEMES[name].dtype).removeprefix('torch.')})" in repr(model.blocks[0].qkv)
    assert str(SCHEMES[name].dtype).removeprefix("torch.") not in repr(model.head)


@pytest.mark.parametrize("name", NAMES)
def test_of_experts_all_but_the_router_is_quantized(name):
    model = blank_model("mixtral", SCHEMES[name])
    narrow = {key.partition("blocks.0.")[2] for key, part in model.named_parameters() if part.dtype in NARROW} - {""}
    assert narrow == {"qkv.weight", "out.weight", "mlp.up.weight", "mlp.down.weight"}
    experts = model.blocks[0].mlp
    assert experts.up.scale.shape == experts.up.weight.shape[:2]
    assert repr(experts.up).endswith(f", {str(SCHEMES[name].dtype).removeprefix('torch.')})")


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_quantized_when_it_is_loaded_and_stays_so(name):
    stack = Stack(3, 6, 4)
    stack.quantize(SCHEMES[name])
    matrices = torch.randn(3, 6, 4)
    stack.load_state_dict({"weight": matrices, "scale": torch.zeros(3, 6)})
    for index, matrix in enumerate(matrices):
        values, scale = quantized(matrix, name)
        assert torch.equal(stack.weight[index].float(), values.float())
        assert torch.equal(stack.scale[index], scale)
    before = stack.weight.clone()
    assert torch.equal(stack.half().weight.float(), before.float())
    assert stack.weight.dtype is SCHEMES[name].dtype
    stack.pack()
    assert stack.matrices is stack.weight, "there is no faster layout"


# ----------------------------------------------------------------------------------------------------------- refusals


def test_names():
    assert find_scheme(None) is None
    assert tuple(SCHEMES) == QUANTIZATIONS
    with pytest.raises(ConfigError, match="quantize is 'int3'; give one of int8, fp8") as caught:
        find_scheme("int3")
    assert caught.value.param == "quantize"


@pytest.mark.parametrize(("name", "capability"), [("fp8", (8, 0)), ("fp8", (7, 5)), ("fp8", (6, 1))])
def test_a_gpu_that_is_too_old(name, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    gpu = torch.device("cuda", 0)
    found = ".".join(map(str, capability))
    with pytest.raises(ConfigError, match=rf"takes a GPU of compute capability 8\.9; Some GPU has {found}.*'int8'"):
        find_scheme(name, gpu)
    assert find_scheme("int8", gpu) is SCHEMES["int8"]
    assert find_scheme(name, torch.device("cpu")) is find_scheme(name) is SCHEMES[name]


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_a_gpu_that_is_new_enough(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name, scheme in SCHEMES.items():
        assert find_scheme(name, torch.device("cuda", 0)) is scheme
