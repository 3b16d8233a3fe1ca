"""scripts/environment.sh and what sources it, on machines that lack something: a stand-in plays python and pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("environment.sh", "quickstart", "test", "choose_torch.py")

# Plays the interpreter of a machine, of the virtual environment that it makes, and pip. Every call goes to calls.log.
PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
"-c import sys; print"*) [ "$VERSION" = old ] && exit 1; echo "$VERSION" ;;
"-c import ensurepip, venv") [ -z "$NO_VENV" ] ;;
--version) echo "Python $VERSION" ;;
"-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    echo "command = $0 -m venv $3" >"$3/pyvenv.cfg" ;;
"-m pip --version") echo "pip 99" ;;
"-c import importlib.metadata"*) [ -e "$(dirname "$CALLS")/torch" ] ;;
*choose_torch.py)
    [ -z "$NO_TORCH" ] || { echo "no CPU build of torch" >&2; exit 1; }
    echo "torch==2.13.0 --index-url https://cpu" ;;
"-m pip install "*)
    echo "Collecting something (from nowhere): details"
    [ -z "$PIP_SLEEP" ] || sleep "$PIP_SLEEP"
    [ -z "$PIP_FAILS" ] || { echo "ERROR: no matching distribution"; exit "$PIP_FAILS"; }
    case "$*" in
    *torch*) touch "$(dirname "$CALLS")/torch" ;;
    *) cp "$0" "$(dirname "$0")/headrace" ;;
    esac ;;
*hashlib*) echo "$3 $(cksum <"$3/setup.py")" ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
# Without these, a stand-in could be passed over for the machine's own.
TOOLS = (
    *("bash", "basename", "cat", "cksum", "cp", "dirname", "flock", "grep", "mkdir", "mv", "rm", "sed", "sleep"),
    *("tail", "tee", "touch", "tr", "getconf", "env"),
)


class Machine:
    """A checkout and a PATH of its own."""

    def __init__(self, folder):
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.calls_log = folder / "calls.log"
        self.env = {"PATH": str(self.bin), "CALLS": str(self.calls_log), "VERSION": "3.12", "HOME": str(folder)}
        for part in ("scripts", "broker", "headrace"):
            (self.root / part).mkdir(parents=True)
        for name in SCRIPTS:
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        (self.root / "setup.py").write_text("first")
        (self.root / "headrace/broker").symlink_to("../broker")
        self.bin.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def add_python(self, name="python3"):
        """Install an interpreter."""
        path = self.bin / name
        path.write_text(PYTHON)
        path.chmod(0o755)
        return path

    def run(self, script='. scripts/environment.sh; prepare_environment serve; echo "$VENV"', **env):
        """Run a script as quickstart would begin."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.root,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self):
        """What the stand-in was asked to do so far."""
        return self.calls_log.read_text().splitlines() if self.calls_log.exists() else []

    @property
    def installs(self):
        """What was installed so far."""
        return [call.removeprefix("-m pip install ") for call in self.calls if call.startswith("-m pip install ")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", ["scripts/environment.sh", "scripts/quickstart", "scripts/test", ".ci/run"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", ".ci/run"])
def test_scripts_can_be_started(script):
    assert os.access(ROOT / script, os.X_OK)


def test_environment_is_made_and_filled(machine):
    machine.add_python()

    done = machine.run()

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{machine.root}/.venv\n"
    assert machine.installs == ["torch==2.13.0 --index-url https://cpu", f"--editable {machine.root}[serve]"]
    for expected in (
        "Making a virtual environment",
        "looking for the CPU build",
        "installing headrace[serve]",
        "ready in",
    ):
        assert expected in done.stderr


def test_nothing_happens_the_second_time(machine):
    machine.add_python()
    machine.run()
    before = len(machine.installs)

    done = machine.run()

    assert done.returncode == 0
    assert done.stderr == ""
    assert len(machine.installs) == before


def test_changed_requirements_bring_it_up_to_date(machine):
    machine.add_python()
    machine.run()
    (machine.root / "setup.py").write_text("second")

    done = machine.run()

    assert "Bringing .venv up to date" in done.stderr
    assert machine.installs[-1] == f"--editable {machine.root}[serve]"
    assert len(machine.installs) == 3, "torch is there already"


def test_everything_includes_serving(machine):
    machine.add_python()
    machine.run(". scripts/environment.sh; prepare_environment all")
    before = len(machine.installs)

    machine.run()

    assert machine.installs[-1].endswith("[all]")
    assert len(machine.installs) == before


def test_moved_checkout_gets_a_new_environment(machine, tmp_path):
    """The programs in .venv/bin begin with the path of the interpreter that they were made for."""
    machine.add_python()
    machine.run()
    machine.root = machine.root.rename(tmp_path / "elsewhere")

    done = machine.run()

    assert "Making a virtual environment" in done.stderr
    assert done.stdout == f"{machine.root}/.venv\n"


def test_missing_command_is_installed_again(machine):
    machine.add_python()
    machine.run()
    (machine.root / ".venv/bin/headrace").unlink()

    assert "Bringing .venv up to date" in machine.run().stderr


def test_broken_environment_is_made_anew(machine):
    machine.add_python()
    machine.run()
    (machine.root / ".venv/bin/python").unlink()

    assert "Making a virtual environment" in machine.run().stderr


def test_no_python(machine):
    done = machine.run()

    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


def test_old_python(machine):
    machine.add_python()

    done = machine.run(VERSION="old")

    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr


def test_newer_python_is_found_under_its_own_name(machine):
    machine.add_python("python3.13")

    assert machine.run().returncode == 0


def test_chosen_python_may_have_spaces_in_its_path(machine):
    (machine.bin / "my pythons").mkdir()
    chosen = machine.add_python("my pythons/python")

    done = machine.run(HEADRACE_PYTHON=str(chosen))

    assert done.returncode == 0, done.stderr


def test_no_venv_module(machine):
    machine.add_python()

    done = machine.run(NO_VENV="1")

    assert done.returncode == 1
    assert "apt-get install python3.12-venv" in done.stderr
    assert not (machine.root / ".venv").exists()


def test_links_that_git_wrote_as_files(machine):
    machine.add_python()
    (machine.root / "headrace/broker").unlink()
    (machine.root / "headrace/broker").write_text("../broker")

    done = machine.run()

    assert done.returncode == 1
    assert "core.symlinks=true" in done.stderr
    assert machine.calls == []


def test_no_cpu_build_of_torch(machine):
    machine.add_python()

    done = machine.run(NO_TORCH="1")

    assert done.returncode == 1
    assert "no CPU build of torch" in done.stderr
    assert machine.installs == []


def test_cuda_build_if_it_is_wanted(machine):
    machine.add_python()

    machine.run(HEADRACE_ALLOW_CUDA="1")

    assert machine.installs == [f"--editable {machine.root}[serve]"]


def test_failed_installation_shows_its_end_and_is_taken_up_again(machine):
    machine.add_python()

    done = machine.run(PIP_FAILS="1")

    assert done.returncode == 1
    assert "ERROR: no matching distribution" in done.stderr
    assert "Is the network up" in done.stderr
    assert done.stdout == ""
    assert machine.run().returncode == 0


def test_progress_is_shown_while_pip_is_silent(machine):
    machine.add_python()

    done = machine.run(PIP_SLEEP="6")

    assert " s  Collecting something" in done.stderr


def test_two_at_once_install_once(machine):
    machine.add_python()
    prepare = "(. scripts/environment.sh; prepare_environment serve)"

    done = machine.run(f"{prepare} & {prepare}; wait", PIP_SLEEP="2")

    assert done.returncode == 0
    assert len(machine.installs) == 2
    assert "Waiting for another script" in done.stderr


def test_quickstart_asks_for_a_prompt_and_hands_its_options_on(machine):
    machine.add_python()
    machine.run()
    headrace = machine.root / ".venv/bin/headrace"
    headrace.write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    headrace.chmod(0o755)

    done = machine.run("scripts/quickstart --once --prompt 'a  b' ./model")

    assert done.stdout.split("|")[:2] == ["up", "--prompt"]
    assert done.stdout.endswith("|--once|--prompt|a  b|./model|")


def test_quickstart_help_needs_nothing(machine):
    done = machine.run("scripts/quickstart --help")

    assert done.returncode == 0
    assert "--once" in done.stdout
    assert machine.calls == []


def test_test_runs_pytest_with_its_arguments(machine):
    machine.add_python()
    machine.run(". scripts/environment.sh; prepare_environment all")
    python = machine.root / ".venv/bin/python"
    body = python.read_text().replace(
        "case", 'case "$*" in "-m pytest"*) echo "$OMP_NUM_THREADS $*"; exit 7 ;; esac\ncase', 1
    )
    python.write_text(body)

    done = machine.run("scripts/test tests/broker -x")

    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith("1 -m pytest")
    assert done.stdout.endswith(" tests/broker -x\n")
    assert "the tests of the chat page will be skipped" in done.stderr
