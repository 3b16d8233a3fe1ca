"""Blocks whose attention and feed-forward read the same input: few rows take two launches of products, whatever an
owner puts in the place of a module or hooks into one is called all the same, and neither makes a difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as every_module

from headrace.kernels import block as block_module
from headrace.kernels.block import Block
from headrace.kernels.kv import KVCache
from headrace.kernels.linear import Linear
from headrace.kernels.mlp import MLP
from headrace.kernels.model import Model
from tests.support.batches import make_batch
from tests.support.kernels import Kernels, cases
from tests.support.real_sizes import injected
from tests.support.tiny_models import make_model

FAMILIES = ("falcon-7b", "falcon-40b", "gptj", "gpt_neox")  # one norm, two, biases of one part, of both
JOINT = {"gemv_both": 1, "gemv_sum": 1}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _plain_weights(monkeypatch):
    """Matrices as a GPU has them."""
    monkeypatch.setattr("headrace.kernels.weight.pack_weight", lambda weight: weight)


def make(family: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Model:
    return injected(make_model(family), dtype, device)


def states(model: Model, rows: int, compute: Callable[..., Any] = lambda step, *given: step(*given)) -> torch.Tensor:
    """The last hidden states of some decodes with short contexts, of which the cache holds what it holds."""
    weight = model.embedding.weight
    batch = make_batch([(1, 2 + row) for row in range(rows)], token_ids=list(range(5, 5 + rows)))
    cache = KVCache(model.spec, 64, batch.block_size, weight.dtype, weight.device)
    for index in range(len(model.blocks)):
        for part in cache.layer(index):
            part.copy_(torch.linspace(-1, 1, part.numel()).view(part.shape))
    with torch.inference_mode():
        found: torch.Tensor = compute(model.hidden, batch, cache)
    return found


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    from triton import knobs
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kind: Any = InterpretedFunction if knobs.runtime.interpret else JITFunction
    launch, names = kind.run, []

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kernel.fn.__name__)
        return launch(kernel, *args, **kwargs)

    monkeypatch.setattr(kind, "run", run)
    return names


@cases([*[(family, 1) for family in FAMILIES], ("gptj", 3), ("gpt_neox", 4)])
def test_few_rows_take_two_launches_of_products(kernels: Kernels, case, launches):
    family, rows = case
    model = make(family, kernels.device)
    expected = states(make(family), rows)
    found = states(model, rows, kernels)
    products = Counter(name for name in launches if name.startswith(("gemv", "skinny")))
    assert products == {name: count * len(model.blocks) for name, count in JOINT.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@cases([("gptj", 5)])
def test_more_rows_are_computed_one_after_the_other(kernels: Kernels, case, launches):
    family, rows = case
    expected = states(make(family), rows)
    found = states(make(family, kernels.device), rows, kernels)
    assert not any(name in JOINT for name in launches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


PARTS = ("qkv", "mlp", "mlp.up", "mlp.down", "out")


@pytest.fixture
def joint(monkeypatch) -> list[int]:
    """An entry for each block that was computed by two launches."""
    called: list[int] = []

    def both(*args: Any, compute: Any = block_module.linear_both) -> Any:
        called.append(1)
        return compute(*args)

    monkeypatch.setattr(block_module, "linear_both", both)
    return called


@pytest.mark.parametrize("part", PARTS)
def test_hooks_are_called(part, joint):
    model = make("gptj")
    expected, blocks = states(model, 1), len(model.blocks)
    assert len(joint) == blocks
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        calls: list[nn.Module] = []
        hooked = model.get_submodule(f"blocks.1.{part}")
        hook = getattr(hooked, register)(lambda module, *_, calls=calls: calls.append(module))
        joint.clear()
        assert torch.equal(states(model, 1), expected)
        assert calls == [hooked]
        assert len(joint) == blocks - 1
        hook.remove()
    joint.clear()
    states(model, 1)
    assert len(joint) == blocks


@pytest.mark.parametrize("hook", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_everything_are_called(hook, joint):
    model, calls = make("falcon-7b"), Counter[str]()
    expected = states(model, 1)
    joint.clear()
    with getattr(every_module, hook)(lambda module, *_: calls.update([type(module).__name__])):
        assert torch.equal(states(model, 1), expected)
    assert not joint
    assert calls["Linear"] == 4 * len(model.blocks)
    assert calls["MLP"] == len(model.blocks)


class Doubled(nn.Module):
    """What an owner may put in a module's place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.inner(*args, **kwargs)
        return out * 2


class DoubledLinear(Linear):
    """Or make of it: a class of their own."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) * 2


class DoubledMLP(MLP):
    """Likewise."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) * 2


def replace(block: Block, part: str) -> None:
    owner, _, name = part.rpartition(".")
    module = block.get_submodule(owner)
    setattr(module, name, Doubled(getattr(module, name)))


def refine(block: Block, part: str) -> None:
    module = block.get_submodule(part)
    module.__class__ = DoubledMLP if isinstance(module, MLP) else DoubledLinear


def patch(block: Block, part: str) -> None:
    module = block.get_submodule(part)
    forward: Any = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [replace, refine, patch])
@pytest.mark.parametrize("part", PARTS)
def test_what_an_owner_puts_in_the_place_of_a_module_is_what_is_called(part, change, joint, monkeypatch):
    changed = make("gpt_neox")
    change(changed.blocks[1], part)
    found, blocks = states(changed, 1), len(changed.blocks)
    assert len(joint) == blocks - 1
    monkeypatch.setattr(block_module, "GEMV_ROWS", 0)
    torch.testing.assert_close(found, states(changed, 1))
    assert not torch.allclose(found, states(make("gpt_neox"), 1))
