"""What a person may write for a model, and what it means: a folder, a .gguf file or an id of the Hugging Face hub.

Nothing is fetched or opened here. An id is checked so strictly that no part of it can lead out of the folder or the
address that is made of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import ModelNotFoundError
from headrace.workers.models import known

__all__ = ["Reference", "model_name", "parse"]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repo>(?:{_PART}/)?{_PART})(?:@(?P<revision>{_PART}(?:/{_PART}){{0,3}}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What was meant: `path` for a folder or a file of our own, else `repo` and `revision` of the hub."""

    name: str
    path: Path | None = None
    repo: str = ""
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path is not None and not self.path.is_dir()

    @property
    def key(self) -> str:
        """The folder name in the cache of what comes from the hub."""
        assert self.repo, "only what is fetched has a place in the cache by name"
        revision = f"@{self.revision}" if self.revision else ""
        return (self.repo + revision).replace("/", "--")

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse(model: str | None) -> Reference:
    """What `model` means; None is the default model.

    Raises:
        ModelNotFoundError: it is neither a folder, nor a .gguf file, nor a possible id.
    """
    if model is None:
        return Reference(name=_last(known.DEFAULT.repo), repo=known.DEFAULT.repo)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Reference(name=path.resolve().name, path=path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"There is no file {model!r}; check the path of the .gguf file.", param="model")
        return Reference(name=path.stem, path=path)
    if (famous := known.by_name(model)) is not None:
        return Reference(name=_last(famous.repo), repo=famous.repo)
    found = _HUB_ID.fullmatch(model)
    if found is None or ".." in model or "--" in found["repo"]:
        raise _meaningless(model, path)
    return Reference(name=_last(found["repo"]), repo=found["repo"], revision=found["revision"])


def model_name(model: str | None, folder: Path) -> str:
    """What a model is called when it is served: the last part of its id, the file's stem, or the folder's name."""
    try:
        return parse(model).name or folder.name
    except ModelNotFoundError:  # the folder or file was there when it was resolved; the name must not depend on it
        return Path(model).stem if model and model.endswith(".gguf") else folder.name


def _last(repo: str) -> str:
    return repo.rpartition("/")[2]


def _meaningless(model: str, path: Path) -> ModelNotFoundError:
    if path.is_file():
        what = f"{model!r} is a file, but no .gguf file; give the folder that holds config.json and the weights."
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1:
        what = f"There is no folder {model!r}; check the path."
    else:
        what = (
            f"{model!r} is neither a folder, nor a .gguf file, nor an id such as {known.DEFAULT.repo} (or ID@REVISION)."
        )
    return ModelNotFoundError(what, param="model")
