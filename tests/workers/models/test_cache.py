"""What is in the cache and how models are named; a .gguf file that is converted once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.errors import ConfigError, ModelFilesError, ModelNotFoundError, UnsupportedModelError
from headrace.workers.models import (
    DEFAULT_MODEL,
    cached_models,
    find,
    format_size,
    model_name,
    remove,
    resolve,
    space,
    verify,
)
from headrace.workers.models.reference import parse
from tests.workers.models.tiny_gguf import write_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "Tiny Chat-Q4_K_M.gguf").path


def test_a_gguf_file_is_converted_once(gguf: Path, models: Path) -> None:
    calls = []
    folder = resolve(str(gguf), progress=lambda *call: calls.append(call))
    assert folder.parent == models
    assert folder.name.startswith("Tiny_Chat-Q4_K_M.gguf-")
    assert calls
    calls.clear()
    assert resolve(str(gguf), progress=lambda *call: calls.append(call)) == find(str(gguf)) == folder
    assert calls == []
    assert model_name(str(gguf), folder) == "Tiny Chat-Q4_K_M"
    assert verify(str(gguf)) == (folder, 6)


def test_another_file_of_the_same_name_is_another_model(gguf: Path) -> None:
    first = resolve(str(gguf))
    write_gguf(gguf, seed=1)
    os.utime(gguf, ns=(1, 1))
    second = resolve(str(gguf))
    assert first != second
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


def test_what_an_older_version_converted_is_converted_again(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(str(gguf))
    note = json.loads((folder / "headrace.json").read_bytes())
    (folder / "headrace.json").write_text(json.dumps(note | {"converter": 0}))
    assert resolve(str(gguf)) == folder
    assert json.loads((folder / "headrace.json").read_bytes()) == note


@pytest.mark.parametrize("damage", ["cut off", "file missing", "note missing", "note damaged"])
def test_a_damaged_conversion_is_made_again(gguf: Path, damage: str) -> None:
    folder = resolve(str(gguf))
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "cut off":
        (folder / "model.safetensors").write_bytes(weights[:-1])
    elif damage == "file missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "note missing":
        (folder / "headrace.json").unlink()
    else:
        (folder / "headrace.json").write_text('{"files": 1')
    assert resolve(str(gguf)) == folder
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "tokenizer.json").is_file()


def test_a_file_that_cannot_be_converted_leaves_nothing(tmp_path: Path, models: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "gemma3").path
    with pytest.raises(UnsupportedModelError, match="gemma3"):
        resolve(str(path))
    whole = write_gguf(path).path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFilesError, match=r"tiny\.gguf ends .* cut off"):
        resolve(str(path))
    assert not models.exists()


def test_missing_gguf_file() -> None:
    with pytest.raises(ModelNotFoundError, match=r"There is no file 'nothing\.gguf'"):
        resolve("nothing.gguf")


def test_a_full_disk_is_said_before_converting(gguf: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = space.shutil.disk_usage("/")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"Converting Tiny Chat-Q4_K_M\.gguf takes .* only 1 kB are free"):
        resolve(str(gguf))


def test_a_cache_that_cannot_be_written(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HEADRACE_MODELS", str(tmp_path / "file"))
    for model in (str(gguf), "org/name"):
        with pytest.raises(ConfigError, match=r"models folder .*file cannot be used.*HEADRACE_MODELS"):
            resolve(model)


def test_list_and_remove(gguf: Path, models: Path) -> None:
    assert cached_models() == []
    folder = resolve(str(gguf))
    (models / ".org--half.part").mkdir()
    (models / ".org--half.part" / "model.gguf").write_bytes(b"x" * 100)
    (models / "somebody's folder").mkdir()
    half, whole = cached_models()
    assert (half.model, half.complete, half.size) == ("org/half", False, 100)
    assert (whole.model, whole.complete, whole.folder) == (str(gguf), True, folder)
    assert whole.source == "GGUF file"
    assert remove("org/half") == 100
    assert remove(str(gguf)) == whole.size
    assert cached_models() == []
    assert (models / "somebody's folder").is_dir()
    with pytest.raises(ModelNotFoundError, match="There is no org--half"):
        remove("org/half")


def test_a_folder_of_the_user_is_never_removed(gguf: Path) -> None:
    folder = resolve(str(gguf))
    with pytest.raises(ConfigError, match="folder of your own"):
        remove(str(gguf.parent))
    assert gguf.is_file()
    assert remove(str(folder)) > 0  # by its path, but in the cache
    assert not folder.exists()


def test_find_says_what_is_missing() -> None:
    with pytest.raises(ModelNotFoundError, match=r"not on this machine"):
        find()


def test_names() -> None:
    assert parse(None).repo == DEFAULT_MODEL == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert parse("Qwen2.5-Coder-0.5B-Instruct").repo == DEFAULT_MODEL
    assert model_name(None, Path("/x")) == "Qwen2.5-Coder-0.5B-Instruct"
    assert model_name("org/name@v1", Path("/x")) == "name"
    assert model_name("gpt2", Path("/x")) == "gpt2"
    assert model_name("/gone/file.gguf", Path("/x")) == "file"
    assert model_name("/gone/folder", Path("/x/folder")) == "folder"
    assert parse("org/name@refs/pr/1").key == "org--name@refs--pr--1"
    assert str(parse("org/name@v1")) == "org/name@v1"


def test_the_word_for_a_size() -> None:
    assert [format_size(count) for count in (0, 999, 1000, 1_500_000, 2_340_000_000, 5 * 10**12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "2 MB",
        "2.3 GB",
        "5.0 TB",
    ]


def test_importing_is_cheap() -> None:
    code = (
        "import sys, headrace.workers.models as m; "
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'safetensors', 'tokenizers', 'jinja2'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
