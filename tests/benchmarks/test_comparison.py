"""Processes that fail cost what they were asked for, and no more."""

from __future__ import annotations

import pytest

from headrace.benchmarks import comparison
from headrace.benchmarks.comparison import Comparison
from headrace.benchmarks.measure import Case
from headrace.benchmarks.report import Report
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.worker import OrderError, Worker
from headrace.errors import ConfigError, ModelFilesError
from tests.support.bench_children import fake_subject, unable, work

LIMIT = 60.0


class TestWorker:
    @pytest.fixture
    def worker(self):
        with Worker("bench-test", work, {}) as worker:
            yield worker

    def test_orders_that_fail_leave_it_alive(self, worker):
        assert worker.ask("double", limit=LIMIT, number=4) == 8
        with pytest.raises(OrderError, match=r"^ZeroDivisionError: division by zero$"):
            worker.ask("divide", limit=LIMIT, number=0)
        with pytest.raises(OrderError, match=r"^no_such_package is not installed$"):
            worker.ask("import", limit=LIMIT)
        assert worker.ask("double", limit=LIMIT, number=1) == 2

    def test_errors_of_ours_keep_their_type(self, worker):
        with pytest.raises(OrderError, match="damaged") as caught:
            worker.ask("load", limit=LIMIT)
        assert isinstance(caught.value.error, ModelFilesError)
        assert caught.value.error.param == "model"

    def test_its_end_is_told(self, worker):
        with pytest.raises(OrderError, match="its process ended with code 3"):
            worker.ask("quit", limit=LIMIT, code=3)

    def test_patience_ends(self, worker):
        with pytest.raises(OrderError, match="took longer than 0 s"):
            worker.ask("wait", limit=0.2, seconds=LIMIT)

    def test_one_that_cannot_begin(self):
        with (
            Worker("bench-test", unable, {}) as worker,
            pytest.raises(OrderError, match="no such device") as caught,
        ):
            worker.ask("double", limit=LIMIT, number=1)
        assert isinstance(caught.value.error, ConfigError)


class Surveyor:
    """Knows a model of a hundred positions."""

    def ask(self, order, **fields):
        return {
            "model": {"vocab_size": 10, "max_positions": 100, "generates": True, "dtype": "float32"},
            "least": 0.0005,
        }[order]


@pytest.fixture
def compared(monkeypatch):
    """Ours and vllm, both faked: rows of cases."""
    monkeypatch.setattr(comparison, "run_subject", fake_subject)
    report = Report(None, {"ceilings": {"read": 1.0, "matmul": {"float32": 1.0}}})
    settings = {"device": "cpu", "threads": 1}
    under_test = Comparison(Surveyor(), report, peers=["vllm"], settings=settings)

    def run(name, *batches, alone=False, **more):
        source = Source(name=name, shape="tiny")
        under_test.run(
            [
                Case(
                    measure="decode",
                    source=source,
                    batch=batch,
                    prompt_tokens=5,
                    output_tokens=6,
                    alone=alone,
                    **more,
                )
                for batch in batches
            ]
        )
        return report.rows[-len(batches) :]

    yield run
    under_test.close()


def test_a_peer_that_dies_costs_its_row(compared):
    rows = compared("tiny", 1, 2, 3, 4)

    assert [row.value("headrace") for row in rows] == [1.0] * 4
    assert [row.value("vllm") for row in rows] == [2.0, None, None, 2.0]
    assert "SIGKILL" in rows[1].figures["vllm"]["error"]
    assert rows[2].figures["vllm"] == {"error": "RuntimeError: an illegal memory access was encountered"}
    assert rows[0].figures["vllm"]["times_ours"] == pytest.approx(2.0)
    assert [row.limit for row in rows] == [0.5] * 4


def test_a_peer_that_cannot_load_costs_the_model(compared):
    rows = compared("refused", 1, 4)
    after = compared("tiny", 1)

    assert [row.figures["vllm"]["error"] for row in rows] == ["MemoryError: 12 GB are missing"] * 2
    assert [row.value("headrace") for row in rows] == [1.0, 1.0]
    assert after[0].value("vllm") == 2.0


def test_ours_alone(compared):
    [row] = compared("tiny", 2, alone=True)

    assert list(row.figures) == ["headrace"]


def test_a_pause_comes_before_each_round(compared, monkeypatch):
    slept = []
    monkeypatch.setattr(comparison.time, "sleep", slept.append)
    compared("tiny", 2, alone=True, rounds=3, pause=0.25)
    assert slept.count(0.25) == 1 + 3, "one round is not timed"
