"""Reads the header of a GGUF file and the raw bytes of its tensors; it knows no model, names and values come as stored.

Every count and length in the header is checked against the size of the file before anything is allocated, so a
truncated or hostile file is an error and not a full memory. The header of a real model (300,000 strings of its
vocabulary) is read in a fraction of a second.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from headrace.errors import ConfigError, ModelFilesError, UnsupportedModelError

__all__ = ["GGUFFile", "GGUFTensor"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """Where a tensor is and how it is stored.

    Attributes:
        name: as the file has it, for example blk.0.attn_q.weight.
        shape: outermost dimension first.
        kind: name of its quantization, for example Q4_K or F32.
        offset: of its first byte in the file.
        num_bytes: that it takes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of the innermost dimension; one for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.num_bytes // self.num_rows


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: of the file.
        metadata: key -> number, string, bool or list of them.
        tensors: by name, in the order of the file.

    Raises:
        ModelFilesError: it is not a GGUF file, or it is damaged.
        UnsupportedModelError: it uses a version, byte order or type that we do not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        self._file: BinaryIO = path.open("rb")
        try:
            self.metadata, self.tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read_rows(self, tensor: GGUFTensor, first: int, count: int) -> bytes:
        """The stored bytes of some rows of a tensor."""
        self._file.seek(tensor.offset + first * tensor.row_bytes)
        return self._take(count * tensor.row_bytes)

    def blocks(self, tensor: GGUFTensor, max_elements: int, multiple_of: int = 1) -> Iterator[tuple[int, bytes]]:
        """The tensor in pieces of whole rows: (number of rows, their stored bytes).

        Args:
            tensor: of this file.
            max_elements: most elements of a piece, unless a single group of rows has more.
            multiple_of: rows that stay together.
        """
        columns = tensor.shape[-1]
        step = max(max_elements // columns // multiple_of, 1) * multiple_of
        for first in range(0, tensor.num_rows, step):
            count = min(step, tensor.num_rows - first)
            yield count, self.read_rows(tensor, first, count)

    # ----------------------------------------------------------------------------------------------------- header

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self._take(4) != _MAGIC:
            self._damaged("does not begin with GGUF, so it is another kind of file or damaged")
        version = self._number("I")
        if version not in _VERSIONS:
            big = version and version % 65536 == 0
            raise UnsupportedModelError(
                f"{self.path} is {'a big-endian file' if big else f'of GGUF version {version}'}; Headrace reads "
                f"versions {' and '.join(map(str, _VERSIONS))}, little-endian. Convert the model again "
                "with a newer llama.cpp."
            )
        num_tensors, num_keys = self._count(24), self._count(12)
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        if metadata.get("split.count", 0) > 1:
            raise UnsupportedModelError(
                f"{self.path} is one of {metadata['split.count']} pieces of a model; merge them first: "
                "llama-gguf-split --merge FIRST_PIECE OUTPUT"
            )
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            self._damaged(f"has an alignment of {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        return metadata, {info[0]: self._tensor(start, *info) for info in infos}

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._string(), self._number("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            self._damaged(f"has {num_dimensions} dimensions for {name!r}")
        shape = tuple(self._number("Q") for _ in range(num_dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
        try:
            from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"GGUF files need {error.name}, which is not installed; run: pip install 'headrace[serve]'"
            ) from error
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UnsupportedModelError(
                f"{self.path}: {name} is stored in a quantization (number {number}) that is not known here; "
                "take another quantization of the model, for example Q8_0 or Q4_K_M."
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            self._damaged(f"has a shape of {list(shape)} for {name!r} in {kind.name}, which comes in blocks of {block}")
        num_bytes = math.prod(shape) // block * size
        if start + offset + num_bytes > self._size:
            missing = start + offset + num_bytes - self._size
            self._damaged(f"ends {missing:,} bytes before the end of {name!r}: it was cut off, download it again")
        return GGUFTensor(name=name, shape=shape, kind=kind.name, offset=start + offset, num_bytes=num_bytes)

    # ------------------------------------------------------------------------------------------------------ values

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < _MAX_NESTING:
            return self._array(depth)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        return self._damaged(f"has a value of the unknown type {kind}")

    def _array(self, depth: int) -> list[Any]:
        kind = self._number("I")
        if kind in _SCALARS:
            layout = _SCALARS[kind]
            count = self._count(struct.calcsize(layout))
            return list(struct.unpack(f"<{count}{layout}", self._take(count * struct.calcsize(layout))))
        return [self._value(kind, depth + 1) for _ in range(self._count(8))]

    def _string(self) -> str:
        raw = self._take(self._count(1))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return self._damaged(f"has text that is not UTF-8: {raw[:40]!r}")

    def _count(self, item_size: int) -> int:
        """A count of items of at least that size, which must fit into the rest of the file."""
        count: int = self._number("Q")
        if count * item_size > self._size - self._file.tell():
            self._damaged(f"announces {count:,} items, more than the rest of it can hold")
        return count

    def _number(self, layout: str) -> Any:
        return struct.unpack("<" + layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        raw = self._file.read(count)
        if len(raw) != count:
            self._damaged("ends in the middle of its header or of a tensor: it was cut off, download it again")
        return raw

    def _damaged(self, what: str) -> NoReturn:
        raise ModelFilesError(f"{self.path} {what}.")
