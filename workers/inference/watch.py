"""What CUDA graphs take for granted of a model, and what its owner may change all the same.

A graph reads the weights where they were, and calls no Python. So weights may be changed in place at any time; but
weights and modules that others took the place of, and hooks, must be noticed.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every_module

from headrace.kernels.model import Model

__all__ = ["Watch"]

_KNOWN = ("headrace.", "torch.nn.")  # where classes are from that call nothing of the model's owner


class Watch:
    """Looks at a model, which anybody may change.

    Attributes:
        moves: how often weights or modules were found to be other ones than before.
        changes: how often that, or values of weights.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.moves = 0
        self.changes = 0
        self._parts: list[nn.Module | None] = []
        self._places: list[int] = []
        self._versions: list[int] = []
        self._walk()
        self._weigh()
        self._keep()

    def look(self) -> None:
        """Notice what was changed since the last look; as every call does so, in a fraction of a millisecond."""
        before, versions = (self._parts, self._places), self._versions
        self._parts = [part for parts in self._parts_of for part in parts.values()]
        if self._parts != before[0]:
            self._walk()
        self._weigh()
        if moved := before != (self._parts, self._places):
            self.moves += 1
            self._keep()
        if moved or versions != self._versions:
            self.changes += 1
            self._model.fold()

    def obstacle(self) -> str | None:
        """What a graph would leave out, such as "a hook on blocks.0"; None if nothing. This is quick."""
        if self._foreign is not None:
            return self._foreign
        if any(self._hooks):
            hooked = (name for name, module in self._modules if module._forward_hooks or module._forward_pre_hooks)
            return f"a hook on {next(hooked, 'all modules')}"
        return None

    def _walk(self) -> None:
        """Find all modules, and the dicts in which they keep what may change; these stay."""
        self._modules = [(name or "the model", module) for name, module in self._model.named_modules()]
        modules = [module for _, module in self._modules]
        self._parts_of = [module._modules for module in modules]
        self._parts = [part for parts in self._parts_of for part in parts.values()]
        self._weights_of = [held for module in modules for held in (module._parameters, module._buffers) if held]
        self._attributes = [vars(module) for module in modules]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks += [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        self._stranger = next((text for name, module in self._modules if (text := _stranger(name, module))), None)

    def _weigh(self) -> None:
        """See where the weights are, how often they were changed there, and whose forward is called."""
        weights = [weight for held in self._weights_of for weight in held.values() if weight is not None]
        self._places = [0 if weight.is_mkldnn else weight.data_ptr() for weight in weights]
        # What was made in inference mode does not count its changes.
        self._versions = [0 if weight.is_inference() else weight._version for weight in weights]
        self._foreign = self._stranger
        if any("forward" in attributes for attributes in self._attributes):
            name = next(name for name, module in self._modules if "forward" in vars(module))
            self._foreign = f"the forward of {name}, which is not its own"

    def _keep(self) -> None:
        """Hold the weights' memory: until the next look, graphs go on reading it, whatever takes its place."""
        weights = (*self._model.parameters(), *self._model.buffers())
        self._kept = [weight.detach() for weight in weights]


def _stranger(name: str, module: nn.Module) -> str | None:
    """A module that is not ours."""
    kind = type(module)
    return None if kind.__module__.startswith(_KNOWN) else f"{name}, which is a {kind.__name__} of your own"
