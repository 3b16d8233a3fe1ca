"""Fills a model with the weights of a checkpoint, tensor by tensor.

For a CPU files are mapped, not read: besides the model itself no more than one tensor is in memory at a time. For a GPU
threads read ahead (`headrace.workers.parallel_reader`); besides the model about a gigabyte is there at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace.kernels.inject import Filler, Injected, all_parameters, own_spec
from headrace.kernels.model import Model
from headrace.kernels.policies import POLICIES
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.parallel_reader import ParallelReader

__all__ = ["load_checkpoint", "load_model"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def load_model(
    folder: Path | Checkpoint,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Model:
    """The model of a folder, ready to run.

    Args:
        folder: the model folder, or one that was opened already.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
        device: where the weights go.
        progress: is told bytes done and bytes in all.

    Raises:
        ModelError: files are missing, damaged or do not fit each other, or the family is not covered.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    return load_checkpoint(checkpoint, dtype=dtype, device=device, progress=progress).model


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    device: torch.device | str,
    task: nn.Module | None = None,
    progress: Progress | None = None,
    read_ahead: bool | None = None,
) -> Injected:
    """As `load_model`; fills also what is left to transformers, and tells what the checkpoint holds beyond.

    `read_ahead`: whether threads read the files; None does so for a GPU.
    """
    policy = checkpoint.policy
    with _Files(checkpoint) as files:
        spec = own_spec(checkpoint.spec, policy, files, task)
        model = Model(spec, dtype=checkpoint.dtype(dtype), device=device)
        if task is not None:
            task.to(checkpoint.dtype(dtype)).to_empty(device=device).requires_grad_(False)
        parameters = all_parameters(model, task)
        total, done = sum(parameter.nbytes for parameter in parameters.values()), 0
        filler = Filler(files, policy, spec, task)
        # Looked for before any is read, so that a missing one is missed at once.
        order = [tensor for name in parameters for tensor in filler.tensors_of(name)]
        device = torch.device(device)
        if device.type == "cuda" if read_ahead is None else read_ahead:
            files.read_ahead(order, device)
        if progress is not None:
            progress(0, total)
        for name, parameter in parameters.items():
            filler.fill(name, parameter)
            done += parameter.nbytes
            if progress is not None:
                progress(done, total)
    if unused := filler.unused():
        shown = ", ".join(unused[:5])
        logger.warning("%d tensors of the checkpoint are not part of the model: %s", len(unused), shown)
    model.pack()
    return Injected(model, tuple(unused))


class _Files(contextlib.ExitStack):
    """The tensors of a checkpoint; its files are opened when first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.place = repr(str(checkpoint.folder))
        self.architecture = checkpoint.architecture
        ours = any(checkpoint.policy is policy for policy in POLICIES)
        self.advice = "Fetch the model again." if ours else "Correct the policy, or fetch the model again."
        self._checkpoint = checkpoint
        self._open: dict[Path, Any] = {}
        self._reader: ParallelReader | None = None

    def read_ahead(self, order: list[str], device: torch.device) -> None:
        """From now on `read` is called in this order; read onto the device, ahead of it."""
        self._reader = ParallelReader(self._checkpoint.tensors, order, device)
        self.callback(self._reader.close)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __contains__(self, name: object, /) -> bool:
        return name in self._checkpoint.tensors

    def read(self, name: str) -> Tensor:
        """A tensor, from its file."""
        if self._reader is not None:
            return self._reader.read(name)
        path = self._checkpoint.tensors[name].path
        if path not in self._open:
            self._open[path] = self.enter_context(self._checkpoint.open(path))
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def same(self, first: str, second: str) -> bool:
        """Whether two names mean one tensor: files may hold it twice."""
        one, other = self.read(first), self.read(second)
        # The first rows tell most of those that differ, so that large ones are not read for it.
        return torch.equal(one[:1], other[:1]) and torch.equal(one, other)
