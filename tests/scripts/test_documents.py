"""What README and docs/ show is what happens: every command parses, every program runs, every link leads somewhere."""

import re
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import click
import pytest

from headrace import addresses
from headrace.scripts.main import cli
from tests.scripts.commands import ROOT, Run, call_as_curl, environment

pytestmark = pytest.mark.timeout(300)

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVED = "Qwen2.5-Coder-0.5B-Instruct"


def cases(pattern):
    """What a pattern finds, as cases named by their document."""
    return [
        pytest.param(text, id=f"{path.name}-{number}")
        for path in DOCUMENTS
        for number, text in enumerate(dict.fromkeys(re.findall(pattern, path.read_text(), re.DOTALL | re.MULTILINE)))
    ]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A tiny model under the default one's name: its runtime folder and the URL of its page."""
    from tests.support.tiny_models import save_model

    folder = tmp_path_factory.mktemp("documents") / "tiny"
    folder.mkdir()
    save_model(folder)
    with tempfile.TemporaryDirectory(prefix="hr") as runtime:
        arguments = ("--port", "0", "--served-model-name", SERVED, "--threads", "1")
        with Run(Path(runtime), "up", folder, *arguments) as run:
            yield Path(runtime), run.value("chat page")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The runtime folder of a tiny encoder."""
    from tests.support.tiny_encoders import save_encoder

    folder = tmp_path_factory.mktemp("documents") / "tiny"
    folder.mkdir()
    save_encoder(folder)
    with tempfile.TemporaryDirectory(prefix="hr") as runtime, Run(Path(runtime), "up", folder, "--no-gateway") as run:
        run.value("vectors")
        yield Path(runtime)


@pytest.mark.parametrize("line", [*cases(r"^(headrace [^\n#]*)"), *cases(r"`(?:[A-Z_]+=\S+ )?(headrace [^`\n]*)`")])
def test_commands_parse(line):
    words = shlex.split(line.replace("[MODEL]", "model").replace("COMMAND", "up"))[1:]
    command, context = cli, click.Context(cli, info_name="headrace")
    while isinstance(command, click.Group) and words:
        command = command.get_command(context, words.pop(0))
        assert command is not None
    if "--help" not in words:
        command.make_parser(context).parse_args(words)


# Those of the library need models of other families; tests/inference runs what that page shows.
@pytest.mark.parametrize("program", [case for case in cases(r"```python\n(.*?)```") if "library.md" not in case.id])
def test_programs_run(pool, program, request):
    runtime, page = pool
    if ".embed(" in program:
        runtime = request.getfixturevalue("reader")
    program = program.replace("http://127.0.0.1:8000/", page)

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=runtime,
        env=environment(runtime, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", cases(r"^(curl [^\n]*)"))
def test_curl_lines_get_an_answer(pool, line):
    assert call_as_curl(line.replace("http://127.0.0.1:8000/", pool[1]))["generated_text"]


@pytest.mark.parametrize("target", cases(r"\]\(([^)#]+)\)"))
def test_links_lead_somewhere(target):
    assert any((path.parent / target).exists() for path in DOCUMENTS)


def test_variables_are_those_of_the_code():
    sources = [
        path
        for part in ("headrace", "broker", "client", "gateway", "workers", "scripts")
        for path in (ROOT / part).rglob("*")
    ]
    code = "".join(path.read_text() for path in sources if path.suffix in (".py", ".sh"))
    used = set(re.findall(r"HEADRACE_[A-Z_]+", code))
    documented = set(re.findall(r"^\| `(HEADRACE_[A-Z_]+)`", (ROOT / "docs/operations.md").read_text(), re.MULTILINE))

    assert documented == used


def test_metrics_are_those_of_the_code(pool):
    call_as_curl(
        f'curl {pool[1]}generate -H \'content-type: application/json\' -d \'{{"prompt": "a", "max_length": 3}}\''
    )
    with urllib.request.urlopen(f"{pool[1]}metrics", timeout=60) as answer:
        exported = answer.read().decode()
    named = set(re.findall(r"`(headrace_[a-z_]+)`", (ROOT / "docs/operations.md").read_text()))

    assert named
    assert not [name for name in named if f"# HELP {name} " not in exported]


def test_folders_of_the_readme_are_those_of_the_tree():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`([a-z_]+)/`", text.partition("## Security")[0]))

    assert named == {
        "headrace",
        "kernels",
        "workers",
        "broker",
        "client",
        "gateway",
        "scripts",
        "tests",
        "benchmarks",
        "docs",
    }


def test_paths_that_are_named_exist():
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.[a-z]+)?)`", path.read_text()):
            assert (ROOT / name).exists() or name in ("models/", "blobs/", "specs/", "triton/"), (
                f"{path.name} names {name}"
            )


def test_length_of_socket_paths_is_the_one_documented():
    addresses.check_bind("ipc://" + "x" * 100)
    with pytest.raises(addresses.AddressError):
        addresses.check_bind("ipc://" + "x" * 101)
