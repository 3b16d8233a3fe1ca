"""Steps that are called to learn what they launch: right in all sizes, without results, and with few layers.

No kernel of Triton's runs in a rehearsal (`headrace.workers.parallel_compile`), so what it would write stays as it was
allocated. Therefore memory is allocated as zeros here: a zero is a token, a row and a slot wherever one is looked up,
and nobody trips over what happens to be there. What PyTorch computes, it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from headrace.kernels.spec import LayerSpec

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["few_layers", "rehearsing"]

_FILLED: dict[Any, Callable[..., Any]] = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}


@contextmanager
def rehearsing(model: Model) -> Iterator[None]:
    """Within, the model's steps are rehearsals."""
    with few_layers(model), _Zeros():
        yield


@contextmanager
def few_layers(model: Model) -> Iterator[None]:
    """Within, the model has only the first of its layers, which launch all that the others do."""
    parts: list[tuple[Any, Sequence[LayerSpec]]] = [(model, model.spec.layers)]
    if model.encoder is not None:
        assert model.spec.encoder is not None
        parts.append((model.encoder, model.spec.encoder.layers))
    whole: list[nn.ModuleList] = [part.blocks for part, _ in parts]
    try:
        for part, layers in parts:
            part.blocks = part.blocks[: _enough(layers)]
        yield
    finally:
        for (part, _), blocks in zip(parts, whole, strict=True):
            part.blocks = blocks


def _enough(layers: Sequence[LayerSpec]) -> int:
    """How many of the first layers launch all that there is: each kind, and one more, whose input and cache are not
    where those of the first are; the last as the model's last, which goes on with the tokens that are wanted."""
    enough = max(layers.index(kind) for kind in set(layers)) + 2
    return next((count for count in range(enough, len(layers)) if layers[count - 1] == layers[-1]), len(layers))


class _Zeros(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FILLED.get(func, func)(*args, **(kwargs or {}))
