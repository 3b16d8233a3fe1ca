"""Puts weights into a Model as a policy says: out of a checkpoint's files, or out of a live module, which loses them.

A module's tensors are moved one at a time, each freed before the next is taken, so that model and module are never both
in memory. Whether all of them are there and fit is checked first, on shapes alone: a module that cannot be injected
keeps its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from headrace.errors import ModelFilesError
from headrace.kernels.model import Model
from headrace.kernels.module_weights import ModuleWeights
from headrace.kernels.policies.base import Policy, Source
from headrace.kernels.spec import ModelSpec

__all__ = ["Filler", "Injected", "Weights", "inject", "with_own_tie"]

# What checkpoints hold beyond the weights: tables that can be computed, and the embedding once more.
_COMPUTED = (".inv_freq", ".attn.bias", ".masked_bias", ".attention.bias", ".position_ids")
_COPIES = ("lm_head.weight", "decoder.weight", "decoder.bias", ".embed_tokens.weight")


class Weights(Protocol):
    """Named tensors of one model.

    Attributes:
        place: where they are, for messages.
        architecture: Hugging Face class name of the model.
        advice: what to do if they are not what they should be.
    """

    place: str
    architecture: str
    advice: str

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        ...

    def same(self, first: str, second: str) -> bool:
        """Whether two names mean one tensor."""
        ...


class Filler:
    """Fills parameters of a Model from named tensors."""

    def __init__(self, weights: Weights, policy: Policy, spec: ModelSpec) -> None:
        self._weights = weights
        self._policy = policy
        self._spec = spec
        self._sources = dict(policy.sources(spec))
        self._used: set[str] = set()

    def fill(self, parameter_name: str, parameter: Tensor) -> None:
        """Copy tensors into a parameter, one below the other.

        Raises:
            ModelFilesError: one is missing, they do not add up to the parameter's shape, or the policy names none.
        """
        source = self._source(parameter_name)
        start = 0
        for wanted in source.tensors:
            name = self.find(wanted.removesuffix("?"), required=not wanted.endswith("?"))
            if name is None:
                continue
            tensor = self._weights.read(name)
            try:
                rows = tensor if source.layout is None else source.layout(tensor, self._spec)
                stop = start + len(rows)
                if rows.shape[1:] != parameter.shape[1:] or stop > len(parameter):
                    raise ValueError
            except (RuntimeError, TypeError, ValueError):
                raise self._wrong_shape(name, tensor, parameter) from None
            parameter[start:stop].copy_(rows)
            start = stop
        if start != len(parameter):
            raise self._wrong_shape(" + ".join(source.tensors), tensor, parameter)

    def find(self, wanted: str, *, required: bool = True) -> str | None:
        """The name by which the weights have a tensor; None if they have none and it is not required.

        Raises:
            ModelFilesError: they have none.
        """
        for name in wanted.split("|"):
            for spelled in (name, name.removeprefix(self._policy.prefix)):
                if spelled in self._weights:
                    self._used.add(spelled)
                    return spelled
        if not required:
            return None
        raise ModelFilesError(
            f"{self._weights.place} lacks the tensor {wanted!r} of a {self._weights.architecture}: weights and "
            f"config do not belong together. {self._weights.advice}",
            param="model",
        )

    def unused(self) -> list[str]:
        """What the weights hold beyond the model, but for tables that can be computed and a tied head."""
        known = (*_COMPUTED, *_COPIES)
        return [name for name in self._weights if name not in self._used and not name.endswith(known)]

    def _source(self, parameter_name: str) -> Source:
        source = self._sources.get(parameter_name)
        if source is None:
            raise ModelFilesError(
                f"The policy of {self._policy.family!r} does not say where {parameter_name!r} is, which its spec asks "
                "for. Add it to the policy's weights, or change the spec.",
                param="policy",
            )
        return source

    def _wrong_shape(self, name: str, tensor: Tensor, parameter: Tensor) -> ModelFilesError:
        return ModelFilesError(
            f"The tensor {name} in {self._weights.place} has shape {list(tensor.shape)}, which does not fit "
            f"the {list(parameter.shape)} that its config asks for. {self._weights.advice}",
            param="model",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Injected:
    """A module's model.

    Attributes:
        model: with the weights that the module had.
        unused: tensors of the module that are not part of it.
    """

    model: Model
    unused: tuple[str, ...]


def inject(
    module: nn.Module,
    policy: Policy,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> Injected:
    """Move the weights of a Hugging Face module into a Model; the module is left without any.

    Args:
        module: of the policy's family, in any floating dtype, on any device.
        policy: of its family.
        dtype: of the Model.
        device: where the Model goes.
        progress: is told bytes done and bytes in all.

    Raises:
        ModelFilesError: a weight is missing or has the wrong shape; the module is unchanged.
        UnsupportedModelError: the family is not covered as it is configured, or the weights are packed.
    """
    weights = ModuleWeights(module)
    spec = with_own_tie(policy.spec(module.config), policy, weights)
    model = Model(spec, dtype=dtype, device="meta")
    parameters = dict(model.named_parameters())
    weights.rehearse(lambda: _fill_all(Filler(weights, policy, spec), parameters))

    filler = Filler(weights, policy, spec)
    total, done = sum(parameter.nbytes for parameter in parameters.values()), 0
    for name, blank in parameters.items():
        parameter = nn.Parameter(torch.empty(blank.shape, dtype=dtype, device=device), requires_grad=False)
        filler.fill(name, parameter)
        _replace(model, blank, parameter)
        done += parameter.nbytes
        if progress is not None:
            progress(done, total)
    unused = tuple(name for name in filler.unused() if name not in weights.taken)
    weights.close()
    model.pack()
    return Injected(model, unused)


def with_own_tie(spec: ModelSpec, policy: Policy, weights: Weights) -> ModelSpec:
    """The spec with a head that is tied exactly if the weights' is, whatever their config says."""
    if spec.head is None:
        return spec
    filler = Filler(weights, policy, spec)
    sources = dict(policy.sources(spec))
    try:
        places = [str(filler.find(sources[name].tensors[0])) for name in ("embedding.weight", "head.weight")]
    except (KeyError, ModelFilesError):  # one of them does not exist, so there is nothing to compare
        return spec
    return dataclasses.replace(spec, head=dataclasses.replace(spec.head, tied=weights.same(*places)))


def _fill_all(filler: Filler, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        filler.fill(name, parameter)


def _replace(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Put a parameter wherever the model has another, which may be in two places."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is old:
                setattr(module, name, new)
