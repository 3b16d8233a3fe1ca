"""The threads that read weights for a GPU: what arrives is what is in the files, and what goes wrong is said.

Here they read into memory of the CPU; only the copy to a device is missing, which `test_loading_gpu.py` has.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headrace.errors import ModelFilesError
from headrace.kernels.model import Model
from headrace.workers import parallel_reader
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.loader import loading
from headrace.workers.parallel_reader import ParallelReader
from tests.support.tiny_models import FAMILIES, make_model, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in several files."""
    folder = tmp_path_factory.mktemp("shards")
    save_model(folder, shards=True)
    return folder


@pytest.fixture
def reader_of(monkeypatch):
    """Readers of small pieces, so that tiny tensors have several, closed in the end."""
    monkeypatch.setattr(parallel_reader, "_PIECE", 1000)
    open_ones = []

    def make(places, order):
        open_ones.append(ParallelReader(places, order, CPU))
        return open_ones[-1]

    yield make
    for reader in open_ones:
        reader.close()


@pytest.mark.parametrize("ahead", [1, 10_000, 1 << 30])
def test_tensors_are_those_of_the_files(folder, reader_of, monkeypatch, ahead):
    monkeypatch.setattr(parallel_reader, "_AHEAD", ahead)
    places = Checkpoint(folder).tensors
    order = [*reversed(places), *places]  # any order, and twice
    reader = reader_of(places, order)
    for name in order:
        with safe_open(places[name].path, framework="pt") as file:
            expected = file.get_tensor(name)
        tensor = reader.read(name)
        assert tensor.dtype is expected.dtype
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_types_and_shapes_arrive_as_stored(tmp_path, folder, reader_of, dtype):
    tensors = {
        "matrix": torch.arange(35).reshape(5, 7).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "nothing": torch.empty((0, 3), dtype=dtype),
    }
    checkpoint = Checkpoint(folder)
    save_file(tensors, tmp_path / "some.safetensors")
    checkpoint.files = [tmp_path / "some.safetensors"]
    places = checkpoint.tensors
    assert {name: (place.dtype, place.shape) for name, place in places.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    reader = reader_of(places, list(places))
    for name in places:
        assert torch.equal(reader.read(name).float(), tensors[name].float())


def test_no_more_is_under_way_than_allowed(folder, reader_of, monkeypatch):
    places = Checkpoint(folder).tensors
    largest = max(place.num_bytes for place in places.values())
    monkeypatch.setattr(parallel_reader, "_AHEAD", largest)
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: made.append(empty(*size, **kwargs)) or made[-1])
    order = list(places)
    reader = reader_of(places, order)
    read = 0
    for name in order:
        reader.read(name)
        read += places[name].num_bytes
        assert sum(tensor.numel() for tensor in made) - read <= largest


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path, folder, reader_of):
    path = tmp_path / "short.safetensors"
    save_file({"first": torch.ones(4), "second": torch.ones(5000)}, path)
    checkpoint = Checkpoint(folder)
    checkpoint.files = [path]
    places = checkpoint.tensors
    os.truncate(path, path.stat().st_size - 100)
    reader = reader_of(places, ["first", "second"])
    assert torch.equal(reader.read("first"), torch.ones(4))
    with pytest.raises(ModelFilesError, match=r"short\.safetensors.*ends at byte.*fetch the model again"):
        reader.read("second")


def test_a_file_that_is_gone_is_named(folder, tmp_path, reader_of):
    path = tmp_path / "gone.safetensors"
    save_file({"first": torch.ones(4)}, path)
    checkpoint = Checkpoint(folder)
    checkpoint.files = [path]
    places = checkpoint.tensors
    path.unlink()
    with pytest.raises(ModelFilesError, match=r"gone\.safetensors.*No such file"):
        reader_of(places, ["first"]).read("first")


def open_files():
    """The files behind this process's descriptors, where the system tells."""
    return {str(path.resolve()) for path in Path("/proc/self/fd").glob("*") if path.resolve().suffix == ".safetensors"}


def test_closed_early_it_leaves_nothing_behind(folder):
    before = open_files()
    places = Checkpoint(folder).tensors
    reader = ParallelReader(places, list(places), CPU)
    reader.read(next(iter(places)))
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]
    assert open_files() <= before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_filled_as_from_mapped_files(family, tmp_path, monkeypatch):
    """Stacks, transposed matrices, experts: what the policies make of tensors does not depend on who reads them."""
    monkeypatch.setattr(Model, "pack", lambda model: None)
    make_model(family).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    seen: list[tuple[int, int]] = []
    told = lambda done, total: seen.append((done, total))  # noqa: E731
    models = []
    for ahead in (False, True):
        with loading(checkpoint, dtype="bfloat16", device="cpu", read_ahead=ahead, progress=told) as under_way:
            models.append(under_way.finished().model)
    mapped, read = (dict(model.named_parameters()) for model in models)
    assert mapped.keys() == read.keys()
    assert all(torch.equal(mapped[name], read[name]) for name in mapped)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
