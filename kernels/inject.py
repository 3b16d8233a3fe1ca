"""Puts weights into a Model as a policy says: out of a checkpoint's files, or out of a live module, which loses them.

A module's tensors are moved one at a time, each freed before the next is taken, so that model and module are never both
in memory. Whether all of them are there and fit is checked first, on shapes alone: a module that cannot be injected
keeps its weights.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.kernels.model import Model
from headrace.kernels.policies.base import Policy, Source
from headrace.kernels.spec import ModelSpec

__all__ = ["Filler", "Injected", "Weights", "inject", "quantization_of"]

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
        stacked = parameter.flatten(0, -2) if parameter.ndim > 2 else parameter  # experts are stacked like rows
        start = 0
        for wanted in source.tensors:
            name = self.find(wanted.removesuffix("?"), required=not wanted.endswith("?"))
            if name is None:
                continue
            tensor = self._weights.read(name)
            try:
                rows = tensor if source.layout is None else source.layout(tensor, self._spec)
                stop = start + len(rows)
                if rows.shape[1:] != stacked.shape[1:] or stop > len(stacked):
                    raise ValueError
            except (RuntimeError, TypeError, ValueError):
                raise self._wrong_shape(name, tensor, parameter) from None
            stacked[start:stop].copy_(rows)
            start = stop
        if start != len(stacked):
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
    weights = _ModuleWeights(module)
    spec = _with_own_tie(policy.spec(module.config), policy, weights)
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


def _with_own_tie(spec: ModelSpec, policy: Policy, weights: _ModuleWeights) -> ModelSpec:
    """The spec with a head that is tied exactly if the module's is, whatever its config says."""
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


class _ModuleWeights:
    """The tensors of a live module under the names of its checkpoints; each is freed when it was read for the last
    time.

    transformers names and groups some weights otherwise in memory than in files (the experts of a layer are one
    tensor); what a policy asks for and the module does not have is looked for among what it would save.
    """

    def __init__(self, module: nn.Module) -> None:
        self.architecture = type(module).__name__
        self.place = f"The {self.architecture}"
        self.advice = "Load the model anew, or correct the policy."
        self._module = module
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        stored = set(module.state_dict(keep_vars=True))
        self._names = [name for name, _ in named if name in stored]
        self._check({name: tensor for name, tensor in named if name in stored})
        self._storage = {name: tensor.data_ptr() for name, tensor in named if name in stored}
        self._saved: dict[str, str] | None = None
        self._opened: dict[str, dict[str, Tensor]] = {}
        self._rehearsing = False
        self._uses: Counter[int] = Counter()
        self.taken: set[str] = set()  # its own names of what was read

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object, /) -> bool:
        return name in self._storage or name in self._saved_names()

    def same(self, first: str, second: str) -> bool:
        """Whether two names mean the same memory."""
        return self._storage.get(self._home(first)) == self._storage.get(self._home(second))

    def read(self, name: str) -> Tensor:
        """The tensor, or its shape while rehearsing."""
        home = self._home(name)
        storage = self._storage[home]
        if self._rehearsing:
            self._uses[storage] += 1
            return self._open(name, home, torch.empty_like(self._tensor(home), device="meta"))
        tensor = self._open(name, home, self._tensor(home))
        self.taken.add(home)
        self._uses[storage] -= 1
        if not self._uses[storage]:
            self._free(storage)
        return tensor

    def rehearse(self, work: Callable[[], None]) -> None:
        """Do something with shapes only, and count how often each tensor is read."""
        self._rehearsing = True
        try:
            work()
        finally:
            self._rehearsing = False
            self._opened.clear()

    def close(self) -> None:
        """Free what nobody wanted, and let the module say where its weights are."""
        self._module.to("meta")
        self._module.register_forward_pre_hook(_moved)

    def _home(self, name: str) -> str:
        """The module's own name of a tensor, or of the one that holds it."""
        return name if name in self._storage else self._saved_names()[name]

    def _tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self._module.get_submodule(owner), leaf)
        return tensor.detach()

    def _open(self, name: str, home: str, tensor: Tensor) -> Tensor:
        """What is saved as `name` of a tensor of the module."""
        if name == home:
            return tensor
        if home not in self._opened:
            self._opened[home] = _as_saved(self._module, {home: tensor})
        return self._opened[home][name]

    def _free(self, storage: int) -> None:
        for name in [name for name, place in self._storage.items() if place == storage]:
            self._opened.pop(name, None)
            owner, _, leaf = name.rpartition(".")
            module = self._module.get_submodule(owner)
            blank = torch.empty_like(getattr(module, leaf), device="meta")
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(blank, requires_grad=False)
            else:
                module._buffers[leaf] = blank

    def _saved_names(self) -> dict[str, str]:
        """Names of what would be saved and is not among the module's own, and where each comes from."""
        if self._saved is None:
            blank = {name: torch.empty_like(self._tensor(name), device="meta") for name in self._names}
            saved = _as_saved(self._module, blank)
            changed = [name for name in self._names if name not in saved]
            self._saved = {new: name for name in changed for new in _as_saved(self._module, {name: blank[name]})}
        return self._saved

    def _check(self, tensors: dict[str, Tensor]) -> None:
        if (method := quantization_of(self._module.config)) is not None:
            raise UnsupportedModelError(
                f"{self.place} is quantized ({method}), which is not supported. Load it without quantization.",
                param="model",
            )
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ModelFilesError(
                    f"{self.place} has no weights: {name} is on the meta device. Its weights were never loaded, are "
                    "offloaded, or were moved into an engine before. Load the model anew.",
                    param="model",
                )


def quantization_of(config: Any) -> str | None:
    """How a checkpoint's weights are quantized, None if they are plain numbers."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "quantization_config")


def _as_saved(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names and in the pieces in which transformers saves them."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(module, PreTrainedModel):
        return tensors
    saved: dict[str, Tensor] = revert_weight_conversion(module, tensors)
    return saved


def _moved(module: nn.Module, args: Any) -> None:
    raise UnsupportedModelError(
        f"The weights of this {type(module).__name__} were moved into an engine by init_inference; call that one, or "
        "load the model anew.",
        param="model",
    )
