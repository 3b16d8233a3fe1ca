"""How an encoder was trained to make vectors, as the files say that sentence-transformers writes beside a model."""

from __future__ import annotations

import json
from typing import Any

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.workers.checkpoint import Checkpoint

__all__ = ["pooling_defaults"]

_MODULES = "modules.json"
_TRANSFORMER, _POOLING, _NORMALIZE = "Transformer", "Pooling", "Normalize"
_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


def pooling_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of PoolingParams; empty if the folder says nothing.

    Raises:
        ModelFilesError: a file is damaged.
        UnsupportedModelError: vectors are made in a way that is not supported.
    """
    defaults: dict[str, Any] = {}
    modules = _modules(checkpoint)
    for kind, path in modules:
        if kind == _POOLING:
            defaults["pooling"] = _mode(checkpoint, f"{path}/config.json")
        elif kind not in (_TRANSFORMER, _NORMALIZE):
            raise UnsupportedModelError(
                f"{_MODULES} in {str(checkpoint.folder)!r} names a {kind} behind the model, which is not supported: "
                "its vectors would be others than it was trained for. Choose a model with pooling alone.",
                param="model",
            )
    if modules:
        defaults["normalize"] = any(kind == _NORMALIZE for kind, _ in modules)
    return defaults


def _modules(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Kind and folder of each module, in order."""
    path = checkpoint.folder / _MODULES
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelFilesError(
            f"{str(path)!r} cannot be read: {error!r}. Fetch the model again.", param="model"
        ) from None


def _mode(checkpoint: Checkpoint, name: str) -> str:
    """The one way of pooling that is switched on."""
    config = checkpoint.read_json(name, required=True)
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in _MODES:
        found = " and ".join(mode.removeprefix("pooling_mode_") for mode in modes) or "no mode"
        raise UnsupportedModelError(
            f"{name} in {str(checkpoint.folder)!r} asks for {found}; vectors are made of the mean of all tokens or of "
            "the first one. Choose another model.",
            param="model",
        )
    return _MODES[modes[0]]
