"""What is built and installed: a wheel and a source archive with all parts, and the public names."""

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import headrace

ROOT = Path(__file__).parent.parent
PARTS = ("benchmarks", "broker", "client", "gateway", "kernels", "scripts", "workers")
# What a checkout holds that a clone does not.
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout: building leaves files behind."""
    folder = tmp_path_factory.mktemp("source") / "headrace"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=LEFT_OUT)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*pip, "--wheel-dir", str(folder), str(source)])
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(command, **settings):
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected_files():
    """Every source, page and tuning file of the checkout, by its path in the package."""
    parts = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]
    parts += [path for path in (ROOT / "gateway/static").rglob("*") if path.is_file()]
    parts += (ROOT / "kernels/tuned").glob("*.json")
    own = [*(ROOT / "headrace").glob("*.py"), ROOT / "headrace/py.typed"]
    return {f"headrace/{path.relative_to(ROOT)}" for path in parts} | {str(path.relative_to(ROOT)) for path in own}


def test_wheel_holds_all_parts_as_real_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}

    assert expected_files() <= names
    assert {name.split("/")[0] for name in names} == {"headrace", f"headrace-{headrace.__version__}.dist-info"}
    assert not any("__pycache__" in name or "tests" in name for name in names)


def test_wheel_says_what_it_needs(wheel):
    folder = f"headrace-{headrace.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        licence = archive.read(f"{folder}/licenses/LICENSE").decode()

    needs = metadata.get_all("Requires-Dist")
    base = {line.split(">")[0] for line in needs if "extra ==" not in line}
    assert base == {"click", "jinja2", "msgpack", "pyzmq", "tokenizers"}
    assert set(metadata.get_all("Provides-Extra")) == {"bench", "serve", "test", "all"}
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata["Version"] == headrace.__version__
    assert "Apache License" in licence
    assert "scripts/quickstart" in metadata.get_payload()


def test_commands_run_from_the_wheel(unpacked):
    """As installed, away from the checkout: the entry point, all parts and the page's files."""
    [entry_points] = unpacked.glob("*.dist-info/entry_points.txt")
    assert "headrace = headrace.scripts.main:main" in entry_points.read_text()
    code = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import headrace.broker.serve, headrace.client, headrace.gateway.page
assert headrace.__file__.startswith(sys.path[0]), headrace.__file__
assert "index.html" in headrace.gateway.page.assets()
from headrace.scripts.main import main
main()
"""
    # -P: the folder that is current must not come first.
    command = [sys.executable, "-P", "-c", code, str(unpacked)]
    assert run([*command, "--version"], cwd=unpacked).strip() == f"headrace, version {headrace.__version__}"
    assert "headrace broker" in run([*command, "broker", "--help"], cwd=unpacked)
    decode = ["bench", "decode", "--shape", "tiny", "--no-peers", "--read-gb-s", "1", "--matmul-tflop-s", "1"]
    assert "tiny" in run([*command, *decode, "--output-tokens", "4", "--device", "cpu"], cwd=unpacked)


def test_source_archive_builds_the_same_package(source, wheel, tmp_path):
    """Links survive in the archive, or the files behind them do."""
    code = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    run([sys.executable, "-c", code, str(tmp_path)], cwd=source)
    [archive] = tmp_path.glob("headrace-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*pip, "--wheel-dir", str(tmp_path), str(folder)])
    [rebuilt] = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert set(first.namelist()) == set(second.namelist())


def test_public_names():
    """Changing this list is changing what people's programs rely on."""
    assert headrace.__all__ == [
        "AsyncClient",
        "Client",
        "HeadraceError",
        "InferenceConfig",
        "InferenceEngine",
        "ModelCard",
        "SamplingParams",
        "__version__",
        "errors",
        "init_inference",
        "supported_models",
    ]
    assert all(getattr(headrace, name) is not None for name in headrace.__all__)
    assert set(headrace.__all__) <= set(dir(headrace))


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        headrace.Clinet  # noqa: B018
