"""Fills a model with the weights of a checkpoint, tensor by tensor, each copied once to where it stays.

Files are mapped, not read: besides the model itself no more than one tensor is in memory at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.errors import ModelFilesError
from headrace.kernels.model import Model
from headrace.kernels.policies.base import Source
from headrace.kernels.spec import ModelSpec
from headrace.workers.checkpoint import Checkpoint

__all__ = ["load_model"]

logger = logging.getLogger(__name__)

_HEADS = (
    "lm_head.weight",
    "decoder.weight",
    "decoder.bias",
    ".embed_tokens.weight",
)  # stored once more, though they are the embedding

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
    spec = checkpoint.policy.spec(checkpoint.config)
    model = Model(spec, dtype=checkpoint.dtype(dtype), device=device)
    sources = dict(checkpoint.policy.sources(spec))
    parameters = dict(model.named_parameters())
    total = sum(parameter.nbytes for parameter in parameters.values())
    done = 0
    with _Reader(checkpoint, spec) as reader:
        for name, parameter in parameters.items():
            reader.fill(parameter, sources[name])
            done += parameter.nbytes
            if progress is not None:
                progress(done, total)
        reader.report_unused()
    model.pack()
    return model


class _Reader(contextlib.ExitStack):
    """The checkpoint's files, opened when first needed."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._spec = spec
        self._open: dict[Path, Any] = {}
        self._used: set[str] = set()

    def fill(self, parameter: Tensor, source: Source) -> None:
        """Copy tensors into a parameter, one below the other.

        Raises:
            ModelFilesError: one is missing, or they do not add up to the parameter's shape.
        """
        start = 0
        for wanted in source.tensors:
            name = self._find(wanted.removesuffix("?"), required=not wanted.endswith("?"))
            if name is None:
                continue
            tensor = self._tensor(name)
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

    def report_unused(self) -> None:
        """Say what the checkpoint holds beyond the model, but for tables that can be computed and a tied head."""
        known = (".inv_freq", ".attn.bias", ".masked_bias", ".attention.bias", ".position_ids", *_HEADS)
        unused = [name for name in self._checkpoint.tensors if name not in self._used and not name.endswith(known)]
        if unused:
            shown = ", ".join(unused[:5])
            logger.warning("%d tensors of the checkpoint are not part of the model: %s", len(unused), shown)

    def _find(self, wanted: str, *, required: bool) -> str | None:
        """The name by which the checkpoint has a tensor."""
        prefix = self._checkpoint.policy.prefix
        for name in wanted.split("|"):
            for spelled in (name, name.removeprefix(prefix)):
                if spelled in self._checkpoint.tensors:
                    self._used.add(spelled)
                    return spelled
        if not required:
            return None
        raise ModelFilesError(
            f"{str(self._checkpoint.folder)!r} lacks the tensor {wanted!r} of a {self._checkpoint.architecture}: "
            "weights and config.json do not belong together. Fetch the model again.",
            param="model",
        )

    def _tensor(self, name: str) -> Tensor:
        path = self._checkpoint.tensors[name]
        if path not in self._open:
            self._open[path] = self.enter_context(self._checkpoint.open(path))
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def _wrong_shape(self, name: str, tensor: Tensor, parameter: Tensor) -> ModelFilesError:
        return ModelFilesError(
            f"The tensor {name} in {str(self._checkpoint.folder)!r} has shape {list(tensor.shape)}, which does not fit "
            f"the {list(parameter.shape)} that config.json asks for. Fetch the model again.",
            param="model",
        )
