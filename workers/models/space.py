"""Room on the disk, looked at before anything large is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from headrace.errors import ConfigError

__all__ = ["format_size", "require_space"]

_RESERVE = 64 << 20  # a disk filled to the last byte breaks other things


def require_space(folder: Path, needed: int, what: str) -> None:
    """Return if so many bytes can be written below `folder`.

    Raises:
        ConfigError: they cannot; says how many are missing and what to do.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _RESERVE:
        raise ConfigError(
            f"{what} takes {format_size(needed)} of disk, but only {format_size(free)} are free at {existing}; "
            "free some, or set HEADRACE_MODELS to a folder on a larger disk."
        )


def format_size(count: int) -> str:
    """Bytes for people, in decimal units as disks are sold and downloads shown."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("bytes", "kB", "MB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
