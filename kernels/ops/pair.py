"""What makes an op of a function: its PyTorch reference and its Triton kernel under one signature.

The reference in `norm.py` is written here and there as `@pair`; the kernel is the function of the same name in
`norm_triton.py`. Tensors of a GPU go to the kernel, all others to the reference. The kernel's module, and Triton with
it, is imported when the first GPU tensor comes. This is the only place that looks at the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

__all__ = ["kernels_on_cpu", "pair"]

P = ParamSpec("P")
R = TypeVar("R")

_on_cpu = False


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Send tensors of the CPU to the kernels too, for tests where Triton interprets them (TRITON_INTERPRET=1)."""
    global _on_cpu
    _on_cpu = True
    try:
        yield
    finally:
        _on_cpu = False


def pair(reference: Callable[P, R]) -> Callable[P, R]:
    """The op of a reference whose first argument is a tensor."""

    @wraps(reference)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not (first.is_cuda or _on_cpu):
            return reference(*args, **kwargs)
        result: R = _kernel(reference.__module__, reference.__name__)(*args, **kwargs)
        return result

    return op


@cache
def _kernel(module: str, name: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(import_module(f"{module}_triton"), name)
    return kernel
