"""Folders that people give: what is missing or damaged is named, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.errors import ModelFilesError, ModelNotFoundError
from headrace.workers.models import model_name, resolve, verify
from headrace.workers.models.check import verify_files
from headrace.workers.models.tensor_file import TensorFileWriter, read_header

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with one weights file."""
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (path / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(4, 8), "b": torch.ones(3, dtype=torch.bfloat16)}, path / "model.safetensors")
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same with two weights files and an index."""
    (folder / "model.safetensors").unlink()
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in names.items():
        save_file({tensor: torch.zeros(100)}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder


def test_a_folder_is_served_from_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(folder)) == folder
    assert model_name(str(folder), folder) == "my-model"
    monkeypatch.chdir(folder)
    assert model_name(".", resolve(".")) == "my-model"


def test_shards(sharded: Path) -> None:
    assert resolve(str(sharded)) == sharded


def refused(folder: Path) -> str:
    with pytest.raises(ModelFilesError) as caught:
        resolve(str(folder))
    return caught.value.message


def test_missing_folder() -> None:
    for model in ("/no/such/folder", "./nothing", "a/b/c", "~/nowhere-at-all"):
        with pytest.raises(ModelNotFoundError, match=r"There is no folder"):
            resolve(model)


def test_a_file_that_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no \.gguf file; give the folder"):
        resolve(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no config.json"),
        (["a-q4.gguf"], "give the path of one: "),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
    ],
)
def test_no_config(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert words in refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "fetch the model again"),
        (["pytorch_model.bin"], "pickled ones (pytorch_model.bin), which can run code"),
        (["model-00001-of-00002.safetensors"], "its model.safetensors.index.json is missing"),
        (["model.gguf"], "GGUF"),
    ],
)
def test_no_weights(folder: Path, names: list[str], words: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    message = refused(folder)
    assert "has no weights" in message
    assert words in message


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refused(folder)
    (folder / "tokenizer.model").write_bytes(b"x")  # an older kind, which can be converted when it is loaded
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_bad_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert f"{folder / 'config.json'} " in refused(folder)


def test_a_weights_file_cut_off_anywhere_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        message = refused(folder)
        assert str(path) in message, length
        assert "get the file again" in message.lower()
    path.write_bytes(whole[:-5])
    assert "was cut off: 5 bytes are missing" in refused(folder)
    path.write_bytes(whole + b"12")
    assert "2 bytes that its header does not know" in refused(folder)


def test_a_pointer_of_git_lfs_is_recognized(folder: Path) -> None:
    (folder / "model.safetensors").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\n")
    assert "git lfs pull" in refused(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}x",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "NEW", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelFilesError, match=r"x\.safetensors"):
        read_header(path)


def test_missing_and_damaged_shards_are_named(sharded: Path) -> None:
    second = sharded / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert f"{second} was cut off: 100 bytes" in refused(sharded)
    second.unlink()
    message = refused(sharded)
    assert "lacks model-00002-of-00002.safetensors" in message
    assert "1 of 2" in message


def test_shards_of_different_versions(sharded: Path) -> None:
    save_file({"other": torch.zeros(1)}, sharded / "model-00002-of-00002.safetensors")
    assert "no tensor 'b'" in refused(sharded)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, {"a": 1}, {"a": "../secret.safetensors"}, {"a": ".x.safetensors"}, {"a": "pytorch_model.bin"}],
)
def test_an_index_cannot_lead_out_of_its_folder(sharded: Path, weight_map: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert INDEX in refused(sharded)


def test_headers_of_the_reference_implementation_are_read(folder: Path) -> None:
    header = read_header(folder / "model.safetensors")
    assert {name: info["shape"] for name, info in header.items()} == {"a": [4, 8], "b": [3]}


def test_what_we_write_is_read_by_the_reference_implementation(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "x.safetensors"
    values = torch.arange(6, dtype=torch.bfloat16)
    with TensorFileWriter(path, {"a": (2, 2), "b": (2,)}, dtype="BF16") as writer:
        writer.write(values[:3].view(torch.uint8).numpy().tobytes())
        writer.write(values[3:].view(torch.uint8).numpy().tobytes())
        digest = writer.finish()
    found = load_file(path)
    assert torch.equal(found["a"], values[:4].reshape(2, 2))
    assert torch.equal(found["b"], values[4:])
    assert verify_files(tmp_path, {path.name: digest}) == []
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify_files(tmp_path, {path.name: digest, "gone": digest}) == [path.name, "gone"]


def test_verify_of_a_folder_without_a_note_checks_headers(folder: Path) -> None:
    assert verify(str(folder)) == (folder, 0)
