"""The safetensors format: checks a file by its header, and writes one as its tensors come.

The format: the length of the header as 8 bytes, the header as JSON (name -> dtype, shape, offsets), the data.
Values are never read here, so a file of any size is checked in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from headrace.errors import ModelFilesError

__all__ = ["TensorFileWriter", "read_header"]

_MAX_HEADER = 100_000_000  # as the reference implementation has it
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"


def read_header(path: Path) -> dict[str, Mapping[str, Any]]:
    """The tensors of a file: name -> dtype, shape and data_offsets.

    Raises:
        ModelFilesError: the file is damaged, cut off, or something else.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if _LFS_POINTER.startswith(start) or start == b"":
                _refuse(path, "is a Git LFS pointer, not the weights" if start else "is empty")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            if length > _MAX_HEADER or 8 + length > size:
                _refuse(path, "does not begin with a safetensors header, or was cut off in it")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}. Get the file again.") from error
    if not isinstance(header, dict):
        _refuse(path, "has a header that is not a map")
    header.pop("__metadata__", None)
    _check_extents(path, header, size - 8 - length)
    return header


def _check_extents(path: Path, header: Mapping[str, Any], available: int) -> None:
    """Tensors must lie end to end and fill the file exactly: whatever was cut off or put in shows."""
    end = 0
    try:
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = info["data_offsets"]
            if first != end or (last - first) * 8 != math.prod(info["shape"]) * _BITS.get(info["dtype"], 0):
                _refuse(path, f"has a header that contradicts itself at {name!r}")
            end = last
    except (AttributeError, KeyError, TypeError, ValueError):
        _refuse(path, "has a header that is not as the format has it")
    if end > available:
        _refuse(path, f"was cut off: {end - available:,} bytes are missing")
    if end < available:
        _refuse(path, f"has {available - end:,} bytes that its header does not know")


def _refuse(path: Path, what: str) -> NoReturn:
    advice = "run `git lfs pull` in its folder" if "LFS" in what else "get the file again"
    raise ModelFilesError(f"{path} {what}; {advice}.")


class TensorFileWriter:
    """Writes a file whose tensors are known by name and shape beforehand, and come one after the other in pieces.

    Args:
        path: of the file, which is replaced.
        shapes: name -> shape, in the order in which the tensors will be written.
        dtype: of all of them, for example BF16.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Iterable[int]], *, dtype: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * _BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self.total = end
        self.written = 0
        self._digest = hashlib.sha256()
        self._path = path
        self._file = path.open("wb")
        self._put(struct.pack("<Q", len(raw)) + raw)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append data of the tensor whose turn it is."""
        self._put(data)
        self.written += len(data)

    def finish(self) -> str:
        """Make the file durable; returns its sha256."""
        assert self.written == self.total, f"{self._path.name}: {self.written} of {self.total} bytes were written"
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
