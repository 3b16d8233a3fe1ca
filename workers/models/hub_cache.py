"""Models that Hugging Face's own programs have downloaded already: found in their cache, and served from there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from headrace.errors import ModelNotFoundError
from headrace.workers.models.check import check_folder
from headrace.workers.models.hub import hugging_face_home

__all__ = ["cache_folder", "find_snapshot"]


def cache_folder() -> Path:
    """Where Hugging Face's own programs keep models."""
    found = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(found).expanduser() if found else hugging_face_home() / "hub"


def find_snapshot(repo: str, revision: str | None) -> Path:
    """The folder of a model that is there, whole.

    Raises:
        ModelNotFoundError: it is not there.
        ModelFilesError: it is there in part.
    """
    model = cache_folder() / f"models--{repo.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (model / "refs" / wanted).read_text(encoding="utf-8").strip()
    except OSError:
        commit = wanted
    snapshot = model / "snapshots" / commit
    if not re.fullmatch(r"[0-9A-Za-z_.-]+", commit) or not snapshot.is_dir():
        raise ModelNotFoundError(f"it is not in {cache_folder()}")
    check_folder(snapshot)
    return snapshot
