"""Gets a model into the cache: looks there first, then asks its sources one after the other.

One process does so per model; others that want it meanwhile wait for that one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from headrace.errors import ConfigError, ModelError, ModelNotFoundError
from headrace.workers.models import hub_cache, known
from headrace.workers.models.gguf_convert import VERSION, convert, converted_size
from headrace.workers.models.hub import HubSource
from headrace.workers.models.lock import locked
from headrace.workers.models.progress import Progress
from headrace.workers.models.reference import Reference
from headrace.workers.models.sources import Failure, Source, no_source, reason, try_sources
from headrace.workers.models.space import require_space
from headrace.workers.models.store import Entry, entry_of
from headrace.workers.models.wheel_folder import WheelFolderSource
from headrace.workers.models.wheels import WheelSource

__all__ = ["converted", "fetched", "find"]


def find(reference: Reference) -> Path:
    """Where a model of the hub or a converted GGUF file is, if it is on this machine, whole.

    Raises:
        ModelError: it is not, or it is damaged.
    """
    failure = Failure()
    entry = entry_of(reference)
    try:
        entry.check()
    except (ModelError, OSError) as error:
        failure.add("local cache", error)
    else:
        return entry.folder
    if reference.repo:
        try:
            return hub_cache.find_snapshot(reference.repo, reference.revision)
        except (ModelError, OSError) as error:
            failure.add("Hugging Face cache", error)
    raise _NotHereError(failure)


class _NotHereError(ModelNotFoundError):
    def __init__(self, failure: Failure) -> None:
        super().__init__(f"The model is not on this machine, or not whole:\n{failure}")
        self.failure = failure


def fetched(reference: Reference, progress: Progress) -> Path:
    """The folder of a model of the hub, fetched if need be.

    Raises:
        ModelError: no source has it, each with its reason; or what they have cannot be served.
    """
    try:
        return find(reference)
    except _NotHereError:
        pass
    entry = entry_of(reference)
    with _working_on(entry, progress):
        try:
            return find(reference)  # another process may have fetched it while we waited
        except _NotHereError as error:
            failure = error.failure
        _reuse(entry)
        sources = _sources(reference)
        delivered = try_sources(sources, entry.work, progress, failure)
        if delivered is None:
            raise no_source(reference, failure, wheels=len(sources) > 1)
        facts = {"model": str(reference), **delivered.facts}
        if (model := known.find(reference.repo, reference.revision)) is not None:
            facts["license"] = model.license
        with _disk_errors(entry):
            entry.install(delivered.folder, facts, delivered.digests)
    return entry.folder


def _sources(reference: Reference) -> list[Source]:
    sources: list[Source] = [HubSource(reference.repo, reference.revision)]
    model = known.find(reference.repo, reference.revision)
    if model is not None and model.parts:
        sources.append(WheelSource(model))
    if model is not None and model.wheel is not None:
        sources.append(WheelFolderSource(model, model.wheel))
    return sources


def _reuse(entry: Entry) -> None:
    """Of a damaged model from the hub, keep the files: those that are right need not be downloaded again."""
    commit = entry.note.get("revision")
    if isinstance(commit, str) and commit.isalnum():
        entry.work.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = entry.work / f"hub-{commit}"
        if not kept.exists():
            entry.folder.rename(kept)


def converted(reference: Reference, progress: Progress) -> Path:
    """The folder that a .gguf file was converted into, which is done once.

    Raises:
        ModelError: the file is damaged, or a model that we do not convert.
        ConfigError: the disk is full or not writable.
    """
    assert reference.path is not None
    entry = entry_of(reference)
    try:
        return find(reference)
    except _NotHereError:
        pass
    size = converted_size(reference.path)  # a file that cannot be converted is refused before anything is written
    with _working_on(entry, progress):
        try:
            return find(reference)
        except _NotHereError:
            pass
        with _disk_errors(entry):
            folder = entry.work / "converted"
            shutil.rmtree(entry.work, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
            require_space(folder, size, f"Converting {reference.path.name}")
            digests = convert(reference.path, folder, progress=progress)
            facts = {"model": str(reference.path.resolve()), "source": "GGUF file", "converter": VERSION}
            entry.install(folder, facts, digests)
    return entry.folder


@contextlib.contextmanager
def _working_on(entry: Entry, progress: Progress) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with _disk_errors(entry):
            stack.enter_context(locked(entry.lock, progress))
        yield


@contextlib.contextmanager
def _disk_errors(entry: Entry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"The models folder {entry.folder.parent} cannot be used: {reason(error)}. Mend that, or set "
            "HEADRACE_MODELS to a folder that you can write to."
        ) from error
