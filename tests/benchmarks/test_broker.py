"""The benchmark of the broker runs and says what it promises; how fast anything is, is not a test's business."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from headrace.scripts.main import cli


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_the_benchmark_runs(tmp_path, transport):
    file = tmp_path / "out.json"
    options = f"--streams 5 --groups 2 --clients 2 --seconds 0.3 --runs 1 --transport {transport} --json {file}"
    result = CliRunner().invoke(cli, ["bench", "broker", *options.split()])
    assert result.exit_code == 0, result.output
    assert "direct" in result.output
    assert "bar 200,000" in result.output
    found = json.loads(file.read_text())
    assert found["settings"]["streams"] == 5
    assert found["throughput"][0]["tokens_per_second"] > 0
    assert found["throughput"][0]["broker_cpu"] > 0
    assert set(found["summary"]) == {"tokens_per_second", "added_ms_p50", "added_ms_p99"}
    assert found["latency"][0]["direct_ms_p50"] > 0
