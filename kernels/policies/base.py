"""A family as data: which checkpoints it covers, how their config becomes a ModelSpec, where their weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from headrace.errors import UnsupportedModelError
from headrace.kernels.spec import ModelSpec, RotarySpec

__all__ = ["Policy", "rotary_spec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One family.

    Attributes:
        family: its name, as transformers calls the model type.
        architectures: Hugging Face class names that it covers.
        spec: makes the ModelSpec of a transformers config; raises UnsupportedModelError for what we do not compute.
        weights: parameter of `headrace.kernels.model.Model` -> checkpoint tensors, stacked along their rows in this
            order. `{}` stands for the layer's number.
    """

    family: str
    architectures: tuple[str, ...]
    spec: Callable[[Any], ModelSpec]
    weights: Mapping[str, tuple[str, ...]]

    def sources(self, spec: ModelSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Parameters that a model of this family may have, and the tensors they come from."""
        for name, tensors in self.weights.items():
            if "{}" not in name:
                yield name, tensors
                continue
            for layer in range(spec.num_layers):
                yield name.format(layer), tuple(tensor.format(layer) for tensor in tensors)


def rotary_spec(config: Any, head_dim: int) -> RotarySpec:
    """The rotary part of a config, its scaling for long contexts worked out by transformers.

    Raises:
        UnsupportedModelError: the frequencies change with the length of the text.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        # In fp32 as transformers does it: a last-digit difference grows with the position.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / parameters["rope_theta"] ** exponents
        return RotarySpec(inverse_frequencies=tuple(frequencies.tolist()))
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModelError(
            f"The model scales its rotary positions by {kind!r}, which is not supported; supported are default, "
            "linear, llama3 and yarn. Choose another checkpoint of the family.",
            param="model",
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, None)
    return RotarySpec(inverse_frequencies=tuple(frequencies.tolist()), attention_factor=float(factor))
