"""Where tests run kernels: compiled on a GPU, or interpreted by Triton on the CPU, which takes seconds for what the GPU
does in microseconds, so that its cases are few and small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from headrace.kernels.ops.pair import kernels_on_cpu

__all__ = ["Kernels", "cases", "to_device"]


class Kernels:
    """Calls ops so that their kernels run; results come back to the CPU."""

    def __init__(self, place: str) -> None:
        import triton

        interpreting = triton.knobs.runtime.interpret
        if place == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        if interpreting == (place == "cuda"):
            pytest.skip(f"kernels are {'interpreted' if interpreting else 'compiled'} in this run (TRITON_INTERPRET)")
        self.device = torch.device("cuda" if place == "cuda" else "cpu")

    def many(self, on_gpu: int, interpreted: int) -> int:
        """A number that differs, for the interpreter is slow."""
        return on_gpu if self.device.type == "cuda" else interpreted

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `op` returns when all of its tensors are on the device."""
        args, kwargs = to_device((args, kwargs), self.device)
        with nullcontext() if self.device.type == "cuda" else kernels_on_cpu():
            return to_device(op(*args, **kwargs), "cpu")


def cases(interpreted: Iterable[Any], gpu: Iterable[Any] = ()) -> pytest.MarkDecorator:
    """Parameters `kernels` and `case`: some for both places, and more for the GPU alone."""
    interpreted = list(interpreted)
    params = [pytest.param("interpreted", case, id=f"interpreted-{_name(case)}") for case in interpreted]
    params += [pytest.param("cuda", case, id=_name(case), marks=pytest.mark.gpu) for case in [*interpreted, *gpu]]
    return pytest.mark.parametrize(("kernels", "case"), params, indirect=["kernels"])


def _name(case: Any) -> str:
    return str(case).translate(str.maketrans({"(": "", ")": "", "'": "", ",": None, " ": "-"})).replace("torch.", "")


def to_device(value: Any, device: torch.device | str) -> Any:
    """A copy of nested tuples, dicts and dataclasses with all tensors on `device`; those that are there stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)  # it may be a named one
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        fields |= {"_shared": {}} if "_shared" in fields else {}
        return dataclasses.replace(value, **{name: to_device(item, device) for name, item in fields.items()})
    return value
