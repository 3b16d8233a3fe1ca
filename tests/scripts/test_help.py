"""Help of every command: complete, and shown without the heavy imports that would make it slow."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from headrace._version import __version__
from headrace.scripts.main import COMMANDS, cli
from headrace.scripts.options import Command

HEAVY = ("torch", "transformers", "zmq", "numpy", "fastapi", "uvicorn", "pydantic", "tokenizers", "asyncio", "msgpack")


def commands():
    """Every command with the words that call it."""
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        yield [name], command
        if isinstance(command, click.Group):
            for sub in command.list_commands(context):
                yield [name, sub], command.get_command(context, sub)


ALL = [pytest.param(words, command, id=" ".join(words)) for words, command in commands()]
LEAVES = [case for case in ALL if isinstance(case.values[1], Command)]


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: " ".join(words) or "headrace")
def test_help_imports_nothing_heavy(words):
    code = f"""
import sys
from headrace.scripts.main import main
sys.argv = ["headrace", *{words!r}, "--help"]
try:
    main()
finally:
    print("IMPORTED", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {' '.join(['headrace', *words])}")
    assert done.stdout.splitlines()[-1] == "IMPORTED []"


def test_overview_lists_all_commands():
    text = CliRunner().invoke(cli, ["--help"]).output

    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in text
        assert summary.split(",")[0].split(":")[0] in " ".join(text.split())


@pytest.mark.parametrize(("words", "command"), LEAVES)
def test_help_is_complete(words, command):
    """Every option is explained and stands below a heading; every command has examples that parse."""
    text = CliRunner().invoke(cli, [*words, "--help"], prog_name="headrace").output

    assert command.help
    assert command.examples
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, option.name
            assert option.opts[0] in text
    assert "Help:\n" in text
    assert "Examples:\n" in text
    assert all(" ".join(["headrace", *words]) in example for example in command.examples)


@pytest.mark.parametrize(("words", "command"), LEAVES)
def test_options_name_their_defaults_and_units(words, command):
    """An option that takes a value tells what happens without it."""
    text = " ".join(
        CliRunner().invoke(cli, [*words, "--help"], prog_name="headrace", terminal_width=200).output.split()
    )

    for option in command.params:
        if isinstance(option, click.Option) and not (
            option.is_flag or option.multiple or option.hidden or option.required
        ):
            record = option.get_help_record(click.Context(command))
            assert record is not None
            told = "default" in record[1].lower() or option.name in ("model", "system", "prompt")
            assert told, f"{option.opts[0]} does not tell its default"
    assert "Sentinel" not in text


def test_version():
    assert CliRunner().invoke(cli, ["--version"]).output == f"headrace, version {__version__}\n"


def test_unknown_command_names_the_known():
    result = CliRunner().invoke(cli, ["serve"])

    assert result.exit_code == 2
    assert f"Commands: {', '.join(COMMANDS)}." in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["up", "--groups", "0"], "--groups"),
        (["up", "--port", "70000"], "--port"),
        (["up", "--max-model-len", "many"], "--max-model-len"),
        (["up", "--dtype", "float8"], "--dtype"),
        (["up", "--quantize", "int4"], "--quantize"),
        (["up", "--once"], "--prompt"),
        (["up", "--served-model-name", "a\tb"], "model_name"),
        (["up", "no-such-folder/"], "no-such-folder/"),
        (["up", "--kv-tokens", "3"], "kv_tokens is 3"),
        (["up", "--endpoint", "tcp://0.0.0.0:5550"], "beyond this machine"),
        (["up", "--endpoint", "somewhere"], "is not an address"),
        (["up", "--shutdown-timeout", "-1"], "--shutdown-timeout"),
        (["up", "--shutdown-tmeout", "1"], "--shutdown-timeout"),
        (["up", "-tp", "2"], "tensor_parallel"),
        (["broker", "--max-num-queued-reqs", "0"], "--max-num-queued-reqs"),
        (["gateway", "--host", "0.0.0.0", "--port", "0"], "--api-key"),
        (["chat", "--temperature", "-1"], "temperature is -1.0"),
        (["status", "--interval", "0"], "--interval"),
        (["workers", "--threads", "0"], "--threads"),
    ],
)
def test_wrong_values_are_named(arguments, expected, run_dir, monkeypatch):
    monkeypatch.setenv("HEADRACE_RUNTIME_DIR", str(run_dir))
    result = CliRunner().invoke(cli, arguments)

    assert result.exit_code == 2
    assert expected in result.output
    assert "Traceback" not in result.output


class TestErrors:
    """What a command makes of exceptions."""

    @staticmethod
    def run(error, *arguments):
        from headrace.scripts.options import command

        @command("try", "headrace try")
        def attempt():
            """Try."""
            raise error

        return CliRunner().invoke(attempt, list(arguments))

    def test_settings_that_are_wrong(self):
        from headrace.errors import ConfigError

        result = self.run(ConfigError("Do it otherwise."))
        assert (result.exit_code, result.output) == (2, "Error: Do it otherwise.\n")

    def test_services_that_fail(self):
        from headrace.errors import BrokerConnectionError

        result = self.run(BrokerConnectionError("Nobody answers."))
        assert (result.exit_code, result.output) == (1, "Error: Nobody answers.\n")

    def test_bugs(self):
        result = self.run(ZeroDivisionError("one by nothing"))
        assert result.exit_code == 1
        assert result.output.startswith("Error: ZeroDivisionError: one by nothing\n")
        assert "--debug" in result.output

    def test_debug_shows_the_traceback(self, monkeypatch):
        monkeypatch.setenv("HEADRACE_DEBUG", "")
        error = ZeroDivisionError("one by nothing")
        assert self.run(error, "--debug").exception is error

    def test_ctrl_c(self):
        assert self.run(KeyboardInterrupt()).exit_code == 130


def test_serving_without_the_extra_names_what_is_missing(monkeypatch):
    from headrace.scripts import shared

    monkeypatch.setattr(shared.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    result = CliRunner().invoke(cli, ["up"])

    assert result.exit_code == 2
    assert "not installed: torch." in result.output
    assert 'pip install "headrace[serve]"' in result.output
