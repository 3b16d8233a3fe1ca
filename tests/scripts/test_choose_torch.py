"""Which torch is installed on a machine without a GPU: fake reports of pip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.scripts import choose_torch

CPU = {"version": "2.13.0+cpu", "requires_dist": ["filelock", "sympy>=1.13"]}
CUDA = {
    "version": "2.13.0",
    "requires_dist": [
        "filelock",
        'nvidia-cublas-cu13==13.1; platform_system == "Linux"',
        "triton==3.7.0",
        'never; python_version < "3"',
    ],
}
ELSEWHERE = {"version": "2.13.0", "requires_dist": ['nvidia-cublas-cu13==13.1; sys_platform == "amiga"']}
OTHER_NAME = {"version": "2.13.0", "requires_dist": ["cuda-bindings==13.0"]}


def pip(monkeypatch, *answers):
    """Let pip report these, one after the other; None finds nothing. Gives the list of its command lines."""
    left, asked = list(answers), []

    def run(command, **settings):
        asked.append(command)
        answer = left.pop(0)
        if answer is None:
            return subprocess.CompletedProcess(command, 1)
        report = Path(command[command.index("--report") + 1])
        report.write_text(json.dumps({"install": [{"metadata": answer}] if answer else []}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(choose_torch.subprocess, "run", run)
    return asked


def test_index_that_has_a_cpu_build(monkeypatch, capsys):
    asked = pip(monkeypatch, CPU)

    assert choose_torch.main() == 0
    assert capsys.readouterr().out == "torch==2.13.0\n"
    assert "--dry-run" in asked[0]
    assert "--no-deps" in asked[0]


@pytest.mark.parametrize("first", [CUDA, OTHER_NAME, None, {}])
def test_second_index_otherwise(monkeypatch, capsys, first):
    asked = pip(monkeypatch, first, CPU)

    assert choose_torch.main() == 0
    assert capsys.readouterr().out == f"torch==2.13.0 --index-url {choose_torch.CPU_INDEX}\n"
    assert asked[1][-2:] == ["--index-url", choose_torch.CPU_INDEX]


def test_requirements_of_other_machines_do_not_count(monkeypatch):
    pip(monkeypatch, ELSEWHERE)

    assert choose_torch.choose() == ["torch==2.13.0"]


@pytest.mark.parametrize("second", [CUDA, None])
def test_nothing_without_cuda(monkeypatch, capsys, second):
    pip(monkeypatch, CUDA, second)

    assert choose_torch.main() == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert "HEADRACE_ALLOW_CUDA=1" in written.err
    assert "PIP_INDEX_URL" in written.err


def test_runs_with_the_standard_library_and_pip_alone(tmp_path):
    """It runs in an environment that holds nothing else yet; with no index to reach, it says what to do."""
    nowhere = "http://127.0.0.1:9/"
    environment = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": nowhere, "HTTPS_PROXY": nowhere, "PATH": os.defpath}
    command = [sys.executable, "-I", choose_torch.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert "No CPU build of torch was found" in done.stderr
    assert "Traceback" not in done.stderr
