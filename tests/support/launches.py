"""What kernels would be compiled for, found out on a CPU: launches are noted instead of made, references compute.

Triton compiles a kernel anew for every set of constants and options, and for whether a number is 1 or a multiple of 16
and an address a multiple of 16 bytes, unless the kernel does without. Here the interpreter's kernels stand for the
compiled ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from headrace.kernels.ops import pair

__all__ = ["noted_launches"]

Key = tuple[Any, ...]


@contextmanager
def noted_launches(*, computed: bool = True) -> Iterator[set[Key]]:
    """What was compiled so far: a key of each kernel and all that it was compiled for. Needs TRITON_INTERPRET=1.

    `computed`: whether references compute what kernels would; otherwise their results stay as they were allocated.
    """
    from triton.runtime.interpreter import InterpretedFunction

    keys: set[Key] = set()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        keys.add(_key(kernel, args, kwargs))

    with (
        patch.object(InterpretedFunction, "run", run),
        patch.object(pair, "_kernel", _noting if computed else pair._kernel),
        pair.kernels_on_cpu(),
    ):
        yield keys


def _noting(module: str, name: str) -> Callable[..., Any]:
    """An op that launches its kernels, which only notes it, and computes by its reference.

    Ops that a reference is made of are no launches. It comes first: PyTorch's parts of a kernel may write over inputs.
    """
    kernel = getattr(import_module(f"{module}_triton"), name)
    reference = getattr(import_module(module), name).__wrapped__

    def op(*args: Any, **kwargs: Any) -> Any:
        with patch.object(pair, "_on_cpu", False):
            result = reference(*args, **kwargs)
        launched = kernel(*args, **kwargs)
        if name == "share_norm" and launched[1] is not None:
            return launched  # the norm is left to the products, which are launched with it
        return result

    return op


def _key(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    kinds = _kinds(kernel)
    given = dict(zip(kinds, args, strict=False)) | kwargs
    parts: list[Any] = [kernel.fn.__module__, kernel.fn.__qualname__]
    for name, value in given.items():
        kind = kinds.get(name, "constant")  # or an option
        parts.append((name, value if kind == "constant" else _specialized(value, kind == "plain")))
    return tuple(parts)


@cache
def _kinds(kernel: Any) -> dict[str, str]:
    """What each argument of a kernel is: constant, plain, which is any number, or special."""
    plain = kernel.kwargs.get("do_not_specialize") or ()
    return {
        name: "constant" if "constexpr" in str(argument.annotation) else "plain" if name in plain else "special"
        for name, argument in inspect.signature(kernel.fn).parameters.items()
    }


def _specialized(value: Any, plain: bool) -> Any:
    """What of an argument a kernel is compiled for."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return str(value.dtype), plain or value.data_ptr() % 16 == 0
    if isinstance(value, bool | float):
        return type(value).__name__
    wide = abs(int(value)) >= 1 << 31
    return (wide,) if plain else (wide, value == 1, value % 16 == 0)
