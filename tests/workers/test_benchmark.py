"""The benchmark of decode steps runs and says what it promises; how fast anything is, is not a test's business."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks.decode import main


def test_the_benchmark_runs(tmp_path):
    file = tmp_path / "out.json"
    options = f"--shape tiny --batch 1 --batch 3 --prompt-tokens 20 --steps 6 --device cpu --json {file}"
    result = CliRunner().invoke(main, options.split())
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [row["batch"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert row["graphs_ms"] is None
        assert min(row["floor_ms"], row["eager_ms"], row["transformers_ms"]) > 0
    assert found["device"] == "cpu"
