"""What a request asks of a model, and for a vector of a text how it is made: `PoolingParams`.

    generate    continue the prompt: a stream of tokens
    embed       one vector for the whole text: a stream of float32 numbers, known at once
    fill_mask   the likeliest token for each mask token of the text: a stream of as many tokens

All of them are streams of items of 32 bits, so what holds for one (positions, credits, replay) holds for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from headrace.errors import InvalidRequestError

__all__ = ["EMBED", "FILL_MASK", "GENERATE", "POOLINGS", "TASKS", "PoolingParams"]

GENERATE = "generate"
EMBED = "embed"
FILL_MASK = "fill_mask"
TASKS = (GENERATE, EMBED, FILL_MASK)

POOLINGS = ("mean", "cls")
_MAX_DIMENSIONS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingParams:
    """How the last hidden states of a text become one vector.

    Attributes:
        pooling: mean is that of all tokens, cls the state of the first one.
        normalize: whether the vector is scaled to length 1, so that products of vectors are cosines.
        dimensions: keep so many of the first numbers, before scaling; for models trained to allow it (Kusupati et al.,
            2022, "Matryoshka"). None keeps all.

    Raises:
        InvalidRequestError: a value is out of range; `param` names the field.
    """

    pooling: str = "mean"
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise _bad("pooling", self.pooling, " or ".join(POOLINGS))
        if type(self.normalize) is not bool:
            raise _bad("normalize", self.normalize, "true or false")
        number = self.dimensions
        if number is not None and (type(number) is not int or not 1 <= number <= _MAX_DIMENSIONS):
            raise _bad("dimensions", number, "a whole number from 1 to the size of the model's vectors")

    def replace(self, **changes: Any) -> PoolingParams:
        """A checked copy with some fields changed."""
        return replace(self, **changes)

    def to_wire(self) -> dict[str, Any]:
        """A msgpack map of the fields that differ from the default."""
        return {name: value for name, default in _defaults().items() if (value := getattr(self, name)) != default}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PoolingParams:
        """The inverse of `to_wire`; fields of a newer version are ignored, bad values raise InvalidRequestError."""
        known = _defaults()
        return cls(**{name: value for name, value in wire.items() if name in known})


@cache
def _defaults() -> Mapping[str, object]:
    default = PoolingParams()
    return {f.name: getattr(default, f.name) for f in fields(default)}


def _bad(name: str, value: object, wanted: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {value!r:.80}; give {wanted}.", param=name)
