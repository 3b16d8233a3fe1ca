"""Whether a folder is a model that can be served, told from its files without reading the weights.

Architectures are not judged here; that is for the part that builds the model. `verify_files` reads everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.card import TOKENIZER
from headrace.errors import ModelFilesError, ModelNotFoundError
from headrace.workers.models.progress import Progress, silent
from headrace.workers.models.tensor_file import read_header

__all__ = ["INDEX", "WEIGHTS", "check_folder", "no_safetensors", "read_json", "shard_names", "verify_files"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = (TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CHUNK = 1 << 20


def check_folder(folder: Path) -> None:
    """Return if the folder has all that a model needs, whole.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFilesError: a file is missing, cut off or damaged; names it and says what to do.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"There is no folder {str(folder)!r}; check the path.", param="model")
    names = sorted(path.name for path in folder.iterdir())
    _check_config(folder, names)
    if INDEX in names:
        _check_shards(folder)
    elif WEIGHTS in names:
        read_header(folder / WEIGHTS)
    else:
        raise no_safetensors(names, str(folder))
    if not any(name in names for name in _TOKENIZERS):
        raise ModelFilesError(
            f"{folder} has no {TOKENIZER}, so text cannot be turned into tokens; copy the model's tokenizer files "
            "there, or fetch the model again.",
            param="model",
        )


def _check_config(folder: Path, names: list[str]) -> None:
    if "config.json" in names:
        read_json(folder / "config.json")
        return
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        advice = f"it holds GGUF files, so give the path of one: {folder / gguf[0]}"
    elif "adapter_config.json" in names:
        advice = "it holds an adapter (LoRA); merge it into its base model and give the folder of the result"
    else:
        advice = "give the folder that save_pretrained wrote, or that a download put there"
    raise ModelFilesError(f"{folder} has no config.json, so it is no model folder: {advice}.", param="model")


def _check_shards(folder: Path) -> None:
    weight_map: Any = read_json(folder / INDEX).get("weight_map")
    names = shard_names(weight_map, folder / INDEX)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelFilesError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} names; {len(names) - len(missing)} of {len(names)} "
            "weight files are there. Copy or download the missing ones.",
            param="model",
        )
    tensors = {name: read_header(folder / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in tensors[name]:
            raise ModelFilesError(
                f"{folder / name} has no tensor {tensor!r}, though {INDEX} says so; the files belong to different "
                "versions. Get them all again.",
                param="model",
            )


def shard_names(weight_map: Any, index: object) -> list[str]:
    """The files that an index names, each a plain name.

    Raises:
        ModelFilesError: the map is not one, or a name leads out of its folder.
    """
    if (
        not isinstance(weight_map, Mapping)
        or not weight_map
        or not all(isinstance(f, str) for f in weight_map.values())
    ):
        raise ModelFilesError(f"{index} has no usable weight_map; get the file again.", param="model")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name.startswith(".") or not name.endswith(".safetensors"):
            raise ModelFilesError(f"{index} names {name!r}, which is not a safetensors file beside it.", param="model")
    return names


def no_safetensors(names: list[str], place: str) -> ModelFilesError:
    """The error for a place that has files, but no weights that we read."""
    pickled = [name for name in names if name.endswith(_PICKLED)]
    gguf = [name for name in names if name.endswith(".gguf")]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        advice = f"{others[0]} has another name, or its {INDEX} is missing; copy the missing file there"
    elif pickled:
        advice = (
            f"it has only pickled ones ({', '.join(pickled[:3])}), which can run code when they are read. On a machine "
            "where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    elif gguf:
        advice = f"it has GGUF files; download one ({gguf[0]}) and give its path"
    else:
        advice = "copy them there, or fetch the model again"
    return ModelFilesError(f"{place} has no weights ({WEIGHTS} or {INDEX}): {advice}.", param="model")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelFilesError: there is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}. Get the file again.", param="model") from error
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} is not a JSON object. Get the file again.", param="model")
    return content


def verify_files(folder: Path, digests: Mapping[str, str], progress: Progress = silent) -> list[str]:
    """Read every file and compare its sha256; returns the names of those that are missing or differ."""
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in digests}
    done, total = 0, sum(sizes.values())
    wrong = []
    for name, expected in digests.items():
        found = None
        if (folder / name).is_file():
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    progress("checking", done, total)
            found = digest.hexdigest()
        if found != expected:
            wrong.append(name)
    return wrong
