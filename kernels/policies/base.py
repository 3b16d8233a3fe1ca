"""A family as data: which checkpoints it covers, how their config becomes a ModelSpec, where their weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.errors import UnsupportedModelError
from headrace.kernels.spec import Activation, Alibi, ModelSpec, RotarySpec

__all__ = ["Policy", "Source", "activation", "alibi", "rotary_of", "rotary_spec", "stack"]

Layout = Callable[[Tensor, ModelSpec], Tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """Where one parameter of `headrace.kernels.model.Model` comes from.

    Attributes:
        tensors: of the checkpoint, stacked along their rows in this order; `a|b` is whichever there is,
            `c?` may be missing.
        layout: turns each of them from the checkpoint's order of rows into ours.
    """

    tensors: tuple[str, ...]
    layout: Layout | None = None


def stack(*tensors: str, layout: Layout | None = None) -> Source:
    """A Source, written short."""
    return Source(tensors, layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One family.

    Attributes:
        family: its name, as transformers calls the model type.
        architectures: Hugging Face class names that it covers.
        spec: makes the ModelSpec of a transformers config; raises UnsupportedModelError for what we do not compute.
        weights: parameter -> Source. `{layer}` stands for a number; with `{expert}` there is a stack of each expert's.
        prefix: what some checkpoints leave out at the beginning of all names but the head's.
    """

    family: str
    architectures: tuple[str, ...]
    spec: Callable[[Any], ModelSpec]
    weights: Mapping[str, Source]
    prefix: str = ""

    def sources(self, spec: ModelSpec) -> Iterator[tuple[str, Source]]:
        """Parameters that a model of this family may have, and where they come from."""
        for name, source in self.weights.items():
            layers = spec.encoder.layers if spec.encoder and name.startswith("encoder.") else spec.layers
            for layer in range(len(layers)) if "{layer}" in name else (0,):
                experts = layers[layer].mlp.experts
                each = any("{expert}" in tensor for tensor in source.tensors)
                tensors = tuple(
                    tensor.format(layer=layer, expert=expert)
                    for expert in range(experts.count if experts and each else 1)
                    for tensor in source.tensors
                )
                yield name.format(layer=layer), Source(tensors, source.layout)


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(name: str) -> Activation:
    """Our name of an activation of transformers.

    Raises:
        UnsupportedModelError: there is none.
    """
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"The model's activation is {name!r}; supported are {', '.join(_ACTIVATIONS)}. Choose another checkpoint.",
            param="model",
        )
    return _ACTIVATIONS[name]


def rotary_spec(config: Any, head_dim: int, *, layer_type: str | None = None, interleaved: bool = False) -> RotarySpec:
    """The rotary part of a config, its scaling for long contexts worked out by transformers.

    Raises:
        UnsupportedModelError: the frequencies change with the length of the text.
    """
    parameters = config.rope_parameters
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        return rotary_of(float(parameters["rope_theta"]), size, interleaved=interleaved)
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModelError(
            f"The model scales its rotary positions by {kind!r}, which is not supported; supported are default, "
            "linear, llama3 and yarn. Choose another checkpoint of the family.",
            param="model",
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=layer_type)
    return RotarySpec(
        inverse_frequencies=tuple(frequencies.tolist()), attention_factor=float(factor), interleaved=interleaved
    )


def rotary_of(theta: float, size: int, *, interleaved: bool = False) -> RotarySpec:
    """Unscaled rotary positions on the first `size` values of a head."""
    # In fp32 as transformers does it: a last-digit difference grows with the position.
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return RotarySpec(inverse_frequencies=tuple((1.0 / theta**exponents).tolist()), interleaved=interleaved)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of ALiBi's authors: a geometric series, and every other term of the next longer one to fill up."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (index + 1) / power) for index in range(power)]
    longer = [2.0 ** (-8.0 * (index + 1) / (2 * power)) for index in range(0, 2 * power, 2)]
    return tuple(slopes + longer[: num_heads - power])


def alibi(num_heads: int, *, rounded: bool = False, scale: float = 1.0) -> Alibi:
    """ALiBi with its authors' slopes."""
    return Alibi(slopes=alibi_slopes(num_heads), rounded=rounded, scale=scale)
