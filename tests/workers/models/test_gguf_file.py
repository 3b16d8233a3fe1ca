"""Reading GGUF: damaged and hostile files are errors with words, and never a full memory."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from headrace.errors import ModelError, ModelFilesError, UnsupportedModelError
from headrace.workers.models.gguf_file import GGUFFile
from tests.workers.models.tiny_gguf import write_gguf


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", head="twice").path.read_bytes()


def opened(path: Path, content: bytes) -> GGUFFile:
    path.write_bytes(content)
    with GGUFFile(path) as file:
        return file


def test_header_is_what_the_gguf_package_reads(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    ours = opened(path, content)
    theirs = gguf.GGUFReader(path)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        assert ours.metadata[key] == theirs.fields[key].contents(), key
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.num_bytes, mine.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))


def test_rows_come_in_pieces(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    with GGUFFile(path) as file:
        tensor = file.tensors["blk.0.attn_q.weight"]
        whole = file.read_rows(tensor, 0, tensor.num_rows)
        assert len(whole) == tensor.num_bytes
        pieces = list(file.blocks(tensor, max_elements=256 * 10, multiple_of=4))
        assert [rows for rows, _ in pieces] == [8] * 32
        assert b"".join(raw for _, raw in pieces) == whole
        assert [rows for rows, _ in file.blocks(tensor, max_elements=1, multiple_of=64)] == [64] * 4


def test_every_way_to_cut_a_file_off_is_said(tmp_path: Path, content: bytes) -> None:
    rng = random.Random(0)
    lengths = [0, 3, 4, 8, 24, len(content) - 1, *(rng.randrange(len(content)) for _ in range(60))]
    for length in lengths:
        with pytest.raises(ModelFilesError, match=r"cut off|begin with GGUF|more than the rest"):
            opened(tmp_path / "cut.gguf", content[:length])


def test_a_hostile_header_takes_no_memory(tmp_path: Path, content: bytes) -> None:
    huge = struct.pack("<Q", 1 << 60)
    for spot in (8, 16, 24):  # tensors, keys, the length of the first key
        with pytest.raises(ModelFilesError, match="more than the rest"):
            opened(tmp_path / "huge.gguf", content[:spot] + huge + content[spot + 8 :])


def test_random_damage_to_the_header_gives_an_error_of_ours_or_none(tmp_path: Path, content: bytes) -> None:
    rng = random.Random(1)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(20_000)] = rng.randrange(256)
        with contextlib.suppress(ModelError):  # anything else fails the test
            opened(tmp_path / "damaged.gguf", bytes(damaged))


def test_other_versions_and_byte_orders_are_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UnsupportedModelError, match="version 1"):
        opened(tmp_path / "old.gguf", content[:4] + struct.pack("<I", 1) + content[8:])
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        opened(tmp_path / "big.gguf", content[:4] + struct.pack(">I", 3) + content[8:])


def test_a_piece_of_a_split_model_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="one of 3 pieces"):
        GGUFFile(tmp_path / "a.gguf")


def test_unknown_quantization_is_named(tmp_path: Path, content: bytes) -> None:
    spot = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    assert content[spot : spot + 4] == struct.pack("<I", gguf.GGMLQuantizationType.Q5_0)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q\.weight .*number 999"):
        opened(tmp_path / "new.gguf", content[:spot] + struct.pack("<I", 999) + content[spot + 4 :])
