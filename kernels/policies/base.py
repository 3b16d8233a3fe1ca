"""A family as data: which checkpoints it covers, how their config becomes a ModelSpec, where their weights are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.errors import HeadraceError, ModelFilesError, UnsupportedModelError
from headrace.kernels.spec import Activation, Alibi, ModelSpec, RotarySpec

__all__ = ["Layout", "Policy", "Source", "activation", "alibi", "rotary_of", "rotary_spec", "stack"]

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
        tasks: likewise, of classes that put a small head of their own on the model. The head stays as transformers
            wrote it; it has parameters, but no buffers.
        spec: makes the ModelSpec of a transformers config, whose `architectures` names the class; raises
            UnsupportedModelError for what we do not compute, and ModelFilesError where it was given code that raises
            anything else.
        weights: parameter -> Source. `{layer}` stands for a number; with `{expert}` there is a stack of each expert's.
        prefix: what some checkpoints leave out at the beginning of all names but the head's.
    """

    family: str
    architectures: tuple[str, ...]
    spec: Callable[[Any], ModelSpec]
    weights: Mapping[str, Source]
    prefix: str = ""
    tasks: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """All Hugging Face class names, with and without heads of their own."""
        return self.architectures + self.tasks

    def sources(self, spec: ModelSpec) -> Iterator[tuple[str, Source]]:
        """Parameters that a model of this family may have, and where they come from."""
        for name, source in self.weights.items():
            layers = spec.encoder.layers if spec.encoder and name.startswith("encoder.") else spec.layers
            for layer in range(len(layers)) if "{layer}" in name else (0,):
                experts = layers[layer].mlp.experts
                count = experts.count if experts and _names_experts(source) else 1
                yield self._numbered(name, {"layer": layer}), self._numbered_source(name, source, layer, count)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", _with_typed_errors(self.spec, self.family))

    def _numbered_source(self, name: str, source: Source, layer: int, num_experts: int) -> Source:
        if not isinstance(source, Source):
            raise ModelFilesError(
                f"The policy of {self.family!r} has a {type(source).__name__} for {name!r}; write stack(...) around "
                "the names of its tensors.",
                param="policy",
            )
        tensors = tuple(
            self._numbered(tensor, {"layer": layer, "expert": expert})
            for expert in range(num_experts)
            for tensor in source.tensors
        )
        return Source(tensors, source.layout)

    def _numbered(self, name: str, numbers: dict[str, int]) -> str:
        try:
            return name.format(**numbers)
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ModelFilesError(
                f"The policy of {self.family!r} names {name!r}, but only {{layer}} and {{expert}} stand for numbers. "
                "Correct it.",
                param="policy",
            ) from None


def _names_experts(source: object) -> bool:
    return isinstance(source, Source) and any("{expert}" in tensor for tensor in source.tensors)


def _with_typed_errors(spec: Callable[[Any], ModelSpec], family: str) -> Callable[[Any], ModelSpec]:
    """A policy's `spec`, which may be anybody's code and reads what may be anybody's config."""

    @functools.wraps(spec)
    def read(config: Any) -> ModelSpec:
        try:
            result = spec(config)
        except HeadraceError:
            raise
        except Exception as error:
            raise ModelFilesError(
                f"The policy of {family!r} cannot make a spec of the config ({type(config).__name__}): "
                f"{type(error).__name__}: {error}. Correct config.json, or the policy if it is your own.",
                param="model",
            ) from error
        if not isinstance(result, ModelSpec):
            raise ModelFilesError(
                f"The policy of {family!r} makes a {type(result).__name__} of the config, not a ModelSpec. Correct it.",
                param="policy",
            )
        return result

    return read


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
