"""Which road decodes take: CUDA graphs, or kernel by kernel, and why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from headrace.errors import ConfigError
from headrace.workers.inference.watch import Watch

__all__ = ["Road", "has_graphs"]


def has_graphs(device: torch.device) -> bool:
    """Whether a device can have graphs at all."""
    return device.type == "cuda"


class Road:
    """The choice for one kind of call, such as streams.

    Args:
        wanted: the setting `cuda_graphs`.
        device: where the model is.
        watch: looks at it.

    Attributes:
        why_not: why the last call could not take graphs; None if it could, or if there was none.
    """

    def __init__(self, wanted: bool | None, device: torch.device, watch: Watch) -> None:
        self._wanted = wanted
        self._device = device
        self._watch = watch
        self._moves = watch.moves
        self._changes = watch.changes
        self._never = None
        if wanted is False:
            self._never = "cuda_graphs is False"
        elif not has_graphs(device):
            self._never = f"{device} has none"
        self._stuck: str | None = None  # what cannot be captured, until it is replaced
        self.why_not: str | None = self._never

    def close(self, why: str) -> None:
        """Note why a call that begins asks for something that has no use for graphs."""
        self.why_not = self._never or why

    def open(self) -> bool:
        """Whether a call that begins can take graphs.

        Raises:
            ConfigError: it cannot, but graphs were insisted on.
        """
        self.why_not = self._never
        if self._never is None and (obstacle := self._watch.obstacle()) is not None:
            self._refuse(f"they would leave out {obstacle}")
        elif self._never is None and self._stuck is not None:
            self._refuse(self._stuck)
        return self.why_not is None

    def is_clear(self) -> bool:
        """Whether the next step of such a call can take those that there are; this is quick."""
        obstacle = self._watch.obstacle()
        if obstacle is not None and self._never is None:
            self.why_not = f"they would leave out {obstacle}"
        return obstacle is None and self._moves == self._watch.moves

    def moved(self) -> bool:
        """Whether graphs that were captured before the last call read weights that are not the model's any more."""
        moved = self._moves != self._watch.moves
        self._moves = self._watch.moves
        if moved:
            self._stuck = None
        return moved

    def changed(self) -> bool:
        """Whether what was computed before the last call is not what the model would compute now."""
        changed = self._changes != self._watch.changes
        self._changes = self._watch.changes
        return changed

    def try_to(self, capture: Callable[[], None]) -> bool:
        """Whether a graph could be captured.

        Raises:
            ConfigError: it could not, but graphs were insisted on.
        """
        try:
            with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
                capture()
        except torch.OutOfMemoryError as error:
            self._refuse(f"there is no memory for them ({_first_line(error)}); lower max_tokens", error)
        except RuntimeError as error:  # what CUDA says to an operation that cannot be captured
            self._stuck = f"the model cannot be captured ({_first_line(error)})"
            self._refuse(self._stuck, error)
        return self.why_not is None

    def _refuse(self, why: str, error: Exception | None = None) -> None:
        self.why_not = why
        if self._wanted:
            raise ConfigError(
                f"cuda_graphs is True, but this call cannot use any: {why}. Leave cuda_graphs out, and such calls are "
                "computed without.",
                param="cuda_graphs",
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
