"""Fills a model with the weights of a checkpoint, tensor by tensor.

For a CPU files are mapped, not read: besides the model itself no more than one tensor is in memory at a time. For a GPU
threads read ahead (`headrace.workers.parallel_reader`); besides the model about a gigabyte is there at a time. One more
thread may fill the model, so that who loads it can do meanwhile what needs its shapes alone (`loading`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from headrace.kernels.inject import Filler, Injected, all_parameters, own_spec
from headrace.kernels.model import Model
from headrace.kernels.policies import POLICIES
from headrace.kernels.quantize import Scheme
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.parallel_reader import ParallelReader

__all__ = ["Loading", "load_model", "loading"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def load_model(
    folder: Path | Checkpoint,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    scheme: Scheme | None = None,
    progress: Progress | None = None,
) -> Model:
    """The model of a folder, ready to run.

    Args:
        folder: the model folder, or one that was opened already.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
        device: where the weights go.
        scheme: in which they are quantized.
        progress: is told bytes done and bytes in all.

    Raises:
        ModelError: files are missing, damaged or do not fit each other, or the family is not covered.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    with loading(checkpoint, dtype=dtype, device=device, scheme=scheme, progress=progress) as under_way:
        return under_way.finished().model


@contextlib.contextmanager
def loading(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    device: torch.device | str,
    task: nn.Module | None = None,
    scheme: Scheme | None = None,
    progress: Progress | None = None,
    read_ahead: bool | None = None,
) -> Iterator[Loading]:
    """A model that can be looked at before its weights are there; whoever leaves early ends the loading.

    Arguments and errors are those of `load_model`, and besides:

    Args:
        task: what is left to transformers, to be filled, too.
        read_ahead: whether threads read the files; None does so for a GPU.
    """
    device = torch.device(device)
    with _Files(checkpoint) as files:
        spec = own_spec(checkpoint.spec, checkpoint.policy, files, task)
        model = Model(spec, dtype=checkpoint.dtype(dtype), device=device, scheme=scheme)
        if task is not None:
            task.to(checkpoint.dtype(dtype)).to_empty(device=device).requires_grad_(False)
        filler = Filler(files, checkpoint.policy, spec, task)
        parameters = all_parameters(model, task)
        # Looked for before any is read, so that a missing one is missed at once.
        order = [tensor for name in parameters for tensor in filler.tensors_of(name)]
        if device.type == "cuda" if read_ahead is None else read_ahead:
            files.read_ahead(order, device)
        under_way = Loading(model, filler, parameters, progress)
        try:
            yield under_way
        finally:
            under_way.stop()


class Loading:
    """A model that is being filled: by a thread of its own once it has begun, otherwise when the end is asked for.

    Args:
        model: it, empty.
        filler: of its weights.
        parameters: to be filled, by name.
        progress: is told bytes done and bytes in all: the first and the last by who asks, those between by who fills.

    Attributes:
        model: whose weights are anything until it is finished, and change meanwhile.
    """

    def __init__(
        self, model: Model, filler: Filler, parameters: dict[str, nn.Parameter], progress: Progress | None
    ) -> None:
        self.model = model
        self._filler = filler
        self._parameters = parameters
        self._scales = model.scales()
        self._total = sum(parameter.nbytes for parameter in parameters.values())
        self._told: Progress = (lambda done, total: None) if progress is None else progress
        self._given_up = False
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._told(0, self._total)

    def begin(self) -> None:
        """Load in a thread of its own, for a program that uses no streams but the default one.

        What is not there yet is zero: who computes with it meanwhile shall find numbers.
        """
        for tensor in (*self._parameters.values(), *self._scales.values()):
            tensor.zero_()
        self._thread = Thread(target=self._run, name="loading", daemon=True)
        self._thread.start()

    def finished(self) -> Injected:
        """The model with all its weights, packed; waits for them.

        Raises:
            ModelError: files are damaged or do not fit each other.
        """
        if self._thread is None:
            self._fill()
        else:
            self._thread.join()
            if self._error is not None:
                raise self._error
        self._told(self._total, self._total)
        if unused := self._filler.unused():
            shown = ", ".join(unused[:5])
            logger.warning("%d tensors of the checkpoint are not part of the model: %s", len(unused), shown)
        self.model.pack()
        return Injected(self.model, tuple(unused))

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self._given_up = True
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        device = next(iter(self._parameters.values())).device
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread begins on the first GPU
            self._fill()
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # so that finished is what has arrived
        except BaseException as error:
            self._error = error  # raised again where the end is waited for

    def _fill(self) -> None:
        done = 0
        for name, parameter in self._parameters.items():
            if self._given_up:
                return
            self._filler.fill(name, parameter, self._scales.get(name))
            done += parameter.nbytes
            if done < self._total:
                self._told(done, self._total)


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
