"""The tensors of a live module, taken out of it one at a time; and whether weights are plain numbers at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headrace.errors import ModelFilesError, UnsupportedModelError

__all__ = ["ModuleWeights", "quantization_of"]


class ModuleWeights:
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
        self._taken: set[int] = set()  # storage of what was read

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object, /) -> bool:
        return name in self._storage or name in self._saved_names()

    def same(self, first: str, second: str) -> bool:
        """Whether two names mean one tensor: the same memory."""
        return self._storage.get(self._home(first)) == self._storage.get(self._home(second))

    def read(self, name: str) -> Tensor:
        """The tensor, or its shape while rehearsing."""
        home = self._home(name)
        storage = self._storage[home]
        if self._rehearsing:
            self._uses[storage] += 1
            return self._open(name, home, torch.empty_like(self._tensor(home), device="meta"))
        tensor = self._open(name, home, self._tensor(home))
        self._taken.add(storage)
        self._uses[storage] -= 1
        if not self._uses[storage]:
            self._free(storage)
        return tensor

    def took(self, name: str) -> bool:
        """Whether one of the module's own tensors was read, by this name or by another one that it has."""
        return self._storage[name] in self._taken

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
