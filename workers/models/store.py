"""The cache of models: a folder each, complete or not there, with a note on where it came from.

    models/Qwen--Qwen2.5-Coder-0.5B-Instruct/     a model, ready to serve, with headrace.json
    models/.Qwen--...-Instruct.part/              work on it: what is downloaded and converted so far
    models/.Qwen--...-Instruct.lock               who works on it

A model appears by renaming a finished folder, so a process that is killed leaves no half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.addresses import models_dir
from headrace.errors import ModelFilesError, ModelNotFoundError
from headrace.workers.models.check import check_folder
from headrace.workers.models.gguf_convert import VERSION
from headrace.workers.models.lock import locked
from headrace.workers.models.progress import silent
from headrace.workers.models.reference import Reference

__all__ = ["NOTE", "CachedModel", "Entry", "cached_models", "entry_of"]

NOTE = "headrace.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """A model in the cache, as listed.

    Attributes:
        model: what to write to get it.
        folder: where it is; of an unfinished one, where its parts are.
        size: bytes on the disk.
        source: where it came from.
        complete: False if fetching it was interrupted.
    """

    model: str
    folder: Path
    size: int
    source: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One model's place in the cache."""

    folder: Path

    @property
    def work(self) -> Path:
        """Where parts are collected; kept when fetching is interrupted."""
        return self.folder.with_name(f".{self.folder.name}.part")

    @property
    def lock(self) -> Path:
        """The file to lock while working on it."""
        return self.folder.with_name(f".{self.folder.name}.lock")

    @property
    def note(self) -> dict[str, Any]:
        """What was noted when it was installed; empty if nothing was."""
        try:
            note = json.loads((self.folder / NOTE).read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    @property
    def digests(self) -> dict[str, str]:
        """sha256 by file name, as noted."""
        return {name: str(facts.get("sha256")) for name, facts in _files(self.note).items()}

    def check(self) -> None:
        """Return if the model is there and whole, judged by names, sizes and headers.

        Raises:
            ModelNotFoundError: it is not in the cache.
            ModelFilesError: it is damaged, or was made by an older version of us.
        """
        if not self.folder.is_dir():
            raise ModelNotFoundError(f"it is not in {self.folder.parent}")
        note = self.note
        if not note:
            raise ModelFilesError(f"{self.folder} has no {NOTE}, so it was not put there by this program")
        if note.get("converter", VERSION) != VERSION:
            raise ModelFilesError(f"{self.folder} was converted by another version of this program")
        for name, facts in _files(note).items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != facts.get("size"):
                raise ModelFilesError(f"{path} is missing or has not the size it had")
        check_folder(self.folder)

    def install(self, built: Path, facts: Mapping[str, Any], digests: Mapping[str, str]) -> None:
        """Make a finished folder the model, in one step, and drop the work on it."""
        files = {name: {"size": (built / name).stat().st_size, "sha256": digests[name]} for name in sorted(digests)}
        content = json.dumps({"format": 1, **facts, "files": files}, indent=2, sort_keys=True) + "\n"
        (built / NOTE).write_text(content, encoding="utf-8")
        _sync(built / NOTE)
        check_folder(built)
        # A folder in the way is damaged or outdated. Whoever serves from it keeps the open files.
        old = self.work / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        built.rename(self.folder)
        _sync(self.folder.parent)
        shutil.rmtree(self.work, ignore_errors=True)

    def remove(self) -> int:
        """Delete the model and any work on it; returns the bytes freed.

        Raises:
            ModelNotFoundError: there is neither.
            ConfigError: another process is fetching it.
        """
        found = [path for path in (self.folder, self.work) if path.exists()]
        if not found:
            raise ModelNotFoundError(f"There is no {self.folder.name} in {self.folder.parent}.", param="model")
        with locked(self.lock, silent, wait=False):
            freed = sum(_size(path) for path in found)
            for path in found:
                # Out of sight first: nobody must find a folder from which files are vanishing.
                doomed = path.with_name(f".{path.name.lstrip('.')}.removed")
                shutil.rmtree(doomed, ignore_errors=True)
                path.rename(doomed)
                shutil.rmtree(doomed)
        return freed


def _files(note: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    files = note.get("files")
    return files if isinstance(files, dict) and all(isinstance(facts, dict) for facts in files.values()) else {}


def entry_of(reference: Reference) -> Entry:
    """The place of a model from the hub or of a converted GGUF file."""
    if reference.repo:
        return Entry(models_dir() / reference.key)
    assert reference.path is not None
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", reference.path.stem).lstrip(".")[:80]
    path = reference.path.resolve()
    status = path.stat()
    # A file that was replaced by another of the same name must not be mistaken for it.
    identity = hashlib.sha256(f"{path}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()
    return Entry(models_dir() / f"{stem}.gguf-{identity[:12]}")


def cached_models() -> list[CachedModel]:
    """All models in the cache, unfinished ones too, by name."""
    root = models_dir()
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.name.startswith(".") and path.name.endswith(".part") and path.is_dir():
            model = path.name[1 : -len(".part")].replace("--", "/")
            found.append(CachedModel(model=model, folder=path, size=_size(path), source="unfinished", complete=False))
        elif (note := Entry(path).note) and not path.name.startswith("."):
            model, source = str(note.get("model", path.name)), str(note.get("source", "unknown"))
            found.append(CachedModel(model=model, folder=path, size=_size(path), source=source, complete=True))
    return found


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
