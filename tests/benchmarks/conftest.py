"""`headrace bench` as it is typed, with limits that need no measuring."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from click.testing import CliRunner

from headrace.scripts.main import cli

# What any machine can do; measuring it takes longer than the tests.
CEILINGS = ("--read-gb-s", "10", "--matmul-tflop-s", "0.1", "--device", "cpu", "--threads", "1")


@dataclass
class Done:
    """A run that ended well: what it printed, and its JSON."""

    output: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]]


@pytest.fixture
def bench(tmp_path):
    """Runs a measurement."""

    def run(line: str) -> Done:
        file = tmp_path / "out.json"
        result = CliRunner().invoke(cli, ["bench", *line.split(), *CEILINGS, "--json", str(file)])
        assert result.exit_code == 0, result.output
        found = json.loads(file.read_text())
        return Done(result.output, found["facts"], found["rows"])

    return run
