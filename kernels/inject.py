"""Puts weights into a Model as a policy says: out of a checkpoint's files, or out of a live module, which loses them.

With the model goes what is left to transformers, the head of a task: a module of its class whose parameters have the
names that they have in files.

A module's tensors are moved one at a time, each freed before the next is taken, so that model and module are never both
in memory. Whether all of them are there and fit is checked first, on shapes alone: a module that cannot be injected
keeps its weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.errors import ModelError, ModelFilesError, UnsupportedModelError
from headrace.kernels.model import Model
from headrace.kernels.module_weights import ModuleWeights
from headrace.kernels.policies.base import Layout, Policy, Source
from headrace.kernels.quantize import NARROW, Scheme, store
from headrace.kernels.spec import ModelSpec

__all__ = ["Filler", "Injected", "Weights", "all_parameters", "config_of", "inject", "own_spec"]

# What checkpoints hold beyond the weights: tables that can be computed, and the embedding once more.
_COMPUTED = (".inv_freq", ".attn.bias", ".masked_bias", ".attention.bias", ".position_ids")
_COPIES = ("lm_head.weight", "decoder.weight", "decoder.bias", ".embed_tokens.weight")
# What weights are stored in that are not quantized, and names by which quantized ones go.
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PACKED = ("qweight", "weight_packed")

_TASK = "task."  # stands before the names of a task's parameters


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
    """Fills parameters of a Model, and of a task's head, from named tensors."""

    def __init__(self, weights: Weights, policy: Policy, spec: ModelSpec, task: nn.Module | None = None) -> None:
        self._weights = weights
        self._policy = policy
        self._spec = spec
        self._sources = dict(policy.sources(spec))
        if task is not None:
            self._sources |= {f"{_TASK}{name}": Source((name,)) for name, _ in task.named_parameters()}
        self._used: set[str] = set()

    def fill(self, parameter_name: str, parameter: Tensor, scale: Tensor | None = None) -> None:
        """Copy tensors into a parameter, one below the other; if it has factors of its rows, they are quantized.

        Raises:
            ModelFilesError: one is missing, they do not add up to the parameter's shape, or the policy names none.
            UnsupportedModelError: one is quantized.
        """
        source = self._source(parameter_name)
        found: dict[str, Tensor] = {}
        stacked = parameter.flatten(0, -2) if parameter.ndim > 2 else parameter  # experts are stacked like rows
        factors = None if scale is None else scale.flatten()
        start = 0
        for name in self.tensors_of(parameter_name):
            tensor = found[name] = self._read(name)
            rows = tensor if source.layout is None else self._arranged(name, tensor, source.layout, parameter)
            stop = start + (len(rows) if rows.ndim else len(stacked) + 1)
            if rows.shape[1:] != stacked.shape[1:] or stop > len(stacked):
                raise self._wrong_shape({name: tensor}, parameter, source.layout, list(rows.shape))
            store(rows, stacked[start:stop], None if factors is None else factors[start:stop])
            start = stop
        if start != len(stacked):
            raise self._wrong_shape(found, parameter, source.layout, f"{start} rows")

    def tensors_of(self, parameter_name: str) -> list[str]:
        """Names of the tensors that `fill` reads for a parameter, in its order.

        Raises:
            ModelFilesError: one is missing, or the policy names none.
        """
        source = self._source(parameter_name)
        wanted = [(name.removesuffix("?"), not name.endswith("?")) for name in source.tensors]
        found = [self.find(name, required=required) for name, required in wanted]
        names = [name for name in found if name is not None]
        if not names:
            raise self._lacks(" or ".join(source.tensors))
        return names

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
        raise self._lacks(wanted)

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

    def _read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        if tensor.dtype not in _PLAIN:
            raise self._quantized(f"its tensor {name} holds {str(tensor.dtype).removeprefix('torch.')} values")
        return tensor

    def _arranged(self, name: str, tensor: Tensor, layout: Layout, parameter: Tensor) -> Tensor:
        """The rows that a layout makes of a tensor; it may be anybody's code, so anything may go wrong."""
        try:
            rows = layout(tensor, self._spec)
        except Exception as error:
            failure = f"a {type(error).__name__} ({error})"
            raise self._wrong_shape({name: tensor}, parameter, layout, failure) from error
        if not isinstance(rows, Tensor):
            raise self._wrong_shape({name: tensor}, parameter, layout, f"a {type(rows).__name__}")
        return rows

    def _lacks(self, wanted: str) -> ModelError:
        for stem in {name.rpartition(".")[0] for name in wanted.split("|")}:
            for packed in (f"{stem}.{kind}" for kind in _PACKED):
                if packed in self._weights:
                    return self._quantized(f"it has {packed} where {wanted} should be")
        return ModelFilesError(
            f"{self._weights.place} lacks the tensor {wanted!r} of a {self._weights.architecture}: weights and "
            f"config do not belong together. {self._weights.advice}",
            param="model",
        )

    def _quantized(self, sign: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._weights.place} is quantized, though its config does not say so: {sign}. Quantized weights are not "
            "supported; choose a checkpoint in float32, bfloat16 or float16.",
            param="model",
        )

    def _wrong_shape(
        self, tensors: dict[str, Tensor], parameter: Tensor, layout: Layout | None, made: object
    ) -> ModelFilesError:
        shapes = " + ".join(str(list(tensor.shape)) for tensor in tensors.values())
        blame = "" if layout is None else f"; the policy's layout {_name_of(layout)} makes {made} of it"
        return ModelFilesError(
            f"The tensor {' + '.join(tensors)} in {self._weights.place} has shape {shapes}, which does not fit "
            f"the {list(parameter.shape)} that its config asks for{blame}. {self._weights.advice}",
            param="model",
        )


def _name_of(layout: Layout) -> str:
    return getattr(layout, "__name__", None) or repr(layout)


@dataclasses.dataclass(frozen=True, slots=True)
class Injected:
    """A module's model.

    Attributes:
        model: with the weights that the module had.
        unused: tensors of the module that are not part of it.
    """

    model: Model
    unused: tuple[str, ...]


def config_of(module: nn.Module) -> Any:
    """The config of a Hugging Face module, naming the module's class as those of checkpoints do."""
    config: Any = copy.copy(module.config)
    config.architectures = [type(module).__name__]
    return config


def all_parameters(model: Model, task: nn.Module | None) -> dict[str, nn.Parameter]:
    """What a Filler can fill, by name."""
    own = {} if task is None else {f"{_TASK}{name}": parameter for name, parameter in task.named_parameters()}
    return dict(model.named_parameters()) | own


def inject(
    module: nn.Module,
    policy: Policy,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    task: nn.Module | None = None,
    scheme: Scheme | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Injected:
    """Move the weights of a Hugging Face module into a Model; the module is left without any.

    Args:
        module: of the policy's family, in any floating dtype, on any device.
        policy: of its family.
        dtype: of the Model.
        device: where the Model goes.
        task: what of the module is left to transformers, without weights; gets those of the module.
        scheme: in which weights are quantized.
        progress: is told bytes done and bytes in all.

    Raises:
        ModelFilesError: a weight is missing or has the wrong shape; the module is unchanged.
        UnsupportedModelError: the family is not covered as it is configured, or the weights are packed.
    """
    weights = ModuleWeights(module)
    spec = own_spec(policy.spec(config_of(module)), policy, weights, task)
    model = Model(spec, dtype=dtype, device="meta", scheme=scheme)
    parameters = all_parameters(model, task)
    weights.rehearse(lambda: _fill_all(Filler(weights, policy, spec, task), parameters, model.scales()))
    for projection in model.projections().values():
        if projection.scale is not None:
            projection.scale = torch.empty_like(projection.scale, device=device)
    scales = model.scales()

    filler = Filler(weights, policy, spec, task)
    dtypes = {name: blank.dtype if blank.dtype in NARROW else dtype for name, blank in parameters.items()}
    total, done = sum(blank.numel() * dtypes[name].itemsize for name, blank in parameters.items()), 0
    for name, blank in parameters.items():
        parameter = nn.Parameter(torch.empty(blank.shape, dtype=dtypes[name], device=device), requires_grad=False)
        filler.fill(name, parameter, scales.get(name))
        for part in (model, task):
            if part is not None:
                _replace(part, blank, parameter)
        done += parameter.nbytes
        if progress is not None:
            progress(done, total)
    unused = tuple(name for name in filler.unused() if not weights.took(name))
    weights.close()
    model.pack()
    return Injected(model, unused)


def own_spec(spec: ModelSpec, policy: Policy, weights: Weights, task: nn.Module | None = None) -> ModelSpec:
    """The spec as its weights are, whatever their config says: with a head that is tied exactly if theirs is, and
    without a pooler that they do not have, unless a task needs it."""
    filler = Filler(weights, policy, spec)
    sources = dict(policy.sources(spec))
    if spec.pooler and task is None and "pooler.weight" in sources:
        found = filler.find(sources["pooler.weight"].tensors[0], required=False)
        spec = dataclasses.replace(spec, pooler=found is not None)
    if spec.head is None:
        return spec
    try:
        places = [str(filler.find(sources[name].tensors[0])) for name in ("embedding.weight", "head.weight")]
    except (KeyError, ModelFilesError):  # one of them does not exist, so there is nothing to compare
        return spec
    return dataclasses.replace(spec, head=dataclasses.replace(spec.head, tied=weights.same(*places)))


def _fill_all(filler: Filler, parameters: dict[str, nn.Parameter], scales: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        filler.fill(name, parameter, scales.get(name))


def _replace(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Put a parameter wherever the model has another, which may be in two places."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is old:
                setattr(module, name, new)
