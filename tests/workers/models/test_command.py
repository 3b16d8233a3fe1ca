"""`headrace models`: what a person sees, with exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from headrace.scripts.main import cli
from tests.workers.models.tiny_gguf import write_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    return str(write_gguf(tmp_path / "tiny.gguf").path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", *arguments], catch_exceptions=False)


def test_fetch_prints_the_folder_and_nothing_else_on_stdout(gguf: str, models: Path) -> None:
    result = run("fetch", gguf)
    assert result.exit_code == 0
    folder = Path(result.stdout.strip())
    assert folder.parent == models
    assert (folder / "config.json").is_file()
    assert "converting to safetensors" in result.stderr
    assert run("path", gguf).stdout.strip() == str(folder)
    assert run("check", gguf).stdout.strip() == f"{folder}: 6 files are as they were installed."
    assert run("fetch", gguf).stderr == ""


def test_list(gguf: str, models: Path) -> None:
    assert run("list").stdout == f"No models in {models}. Get the default one: headrace models fetch\n"
    assert run("list", "--json").stdout == "[]\n"
    folder = run("fetch", gguf).stdout.strip()
    (models / ".org--half.part").mkdir()
    lines = run("list").stdout.splitlines()
    assert lines[0].split(None, 1)[0] == "org/half"
    assert "unfinished" in lines[0]
    assert lines[1].startswith(gguf)
    assert lines[1].endswith("GGUF file")
    listed = json.loads(run("list", "--json").stdout)
    assert [(entry["model"], entry["complete"]) for entry in listed] == [("org/half", False), (gguf, True)]
    assert listed[1]["folder"] == folder


def test_remove(gguf: str) -> None:
    run("fetch", gguf)
    result = run("remove", gguf)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Removed {gguf}: ")
    again = run("remove", gguf)
    assert again.exit_code == 2
    assert "There is no tiny.gguf-" in again.stderr
    assert run("remove").exit_code == 2  # never everything by accident


def test_a_damaged_model(gguf: str) -> None:
    folder = Path(run("fetch", gguf).stdout.strip())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"!")
    result = run("check", gguf)
    assert result.exit_code == 2
    assert "model.safetensors differ from what was installed" in result.stderr


def test_errors_are_a_message_and_no_traceback() -> None:
    for arguments, words in (
        (["fetch", "./nowhere"], "There is no folder './nowhere'"),
        (["fetch", "org/name"], "Hugging Face hub (127.0.0.1:9): cannot be reached"),
        (["path"], "The model is not on this machine"),
        (["check", "nothing.gguf"], "There is no file"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["fetch"], ["list"], ["check"], ["path"], ["remove"]])
def test_help_has_examples_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from headrace.scripts.main import cli\n"
        "try:\n"
        "    cli(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'gguf', 'zmq', 'headrace.workers.models'} & set(sys.modules)\n"
        "    print('HEAVY', heavy or '')\n"
    )
    command = [sys.executable, "-c", code, "models", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.endswith("HEAVY \n")
    if arguments:
        assert f"headrace models {arguments[0]}" in done.stdout.partition("Examples:")[2]
    else:
        assert all(name in done.stdout for name in ("fetch", "list", "check", "path", "remove"))
