"""Measurements with real processes, end to end on a CPU: starts, served requests, both ways, everything at once."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from headrace.scripts.main import cli
from tests.support.tiny_models import save_model
from tests.support.tiny_tokenizer import VOCAB_SIZE
from tests.support.up import Up

DIGITS = 1e-5  # the file holds six digits, so sums of what it holds may be off by one in the last
PERCENTILES = [f"{name}_p{share}_ms" for name in ("ttft", "tpot", "itl", "e2e") for share in (50, 99)]


def test_starts(bench):
    """A generating shape and an encoder; phases add up, and come in the order of the table."""
    done = bench("startup --shape tiny --shape tiny-bert --starts 1")

    assert [(row["measure"], row["model"]) for row in done.rows] == [
        (f"startup {kind}", f"{shape}, {kind}") for shape in ("tiny", "tiny-bert") for kind in ("cold", "warm")
    ]
    for row in done.rows:
        figure = row["figures"]["headrace"]
        phases = [figure[f"{name}_s"] for name in ("imports", "model", "weights", "memory", "kernels", "broker")]
        assert min(phases) >= 0
        assert figure["imports_s"] > 0
        assert figure["value"] == pytest.approx(figure["ready_s"] + figure["first_token_s"], rel=DIGITS)
        # Its own clock begins with the process, and stops when the launcher hears of it.
        assert sum(phases) == pytest.approx(figure["ready_s"], rel=0.5)
    assert "first token s" in done.output
    assert "ceilings" not in done.facts  # nothing is held against them


def test_served_requests(bench):
    done = bench("serve --shape tiny --requests 6 --request-rate 30 --prompt-tokens 12 --output-tokens 5")

    [row] = done.rows
    figure = row["figures"]["headrace"]
    assert row["case"] == {"requests": 6, "rate": 30.0, "prompt_tokens": 12, "output_tokens": 5}
    assert (figure["completed"], figure["failed"], figure["output_tokens"]) == (6, 0, 30)
    assert figure["value"] == figure["tokens_per_s"] > 0
    assert figure["pool_ready_s"] > 0
    for p50, p99 in zip(PERCENTILES[::2], PERCENTILES[1::2], strict=True):
        assert 0 < figure[p50] <= figure[p99]
    assert figure["e2e_p50_ms"] > figure["ttft_p50_ms"]
    assert "ttft p99 ms" in done.output


def test_an_endpoint(bench, tmp_path):
    """Our own gateway, as a stand-in for any server of OpenAI's API."""
    folder = tmp_path / "mine"
    folder.mkdir()
    save_model(folder)
    with Up(str(folder)) as up:
        up.wait_ready()
        done = bench(
            f"serve --url {up.page}v1 --served-model-name mine --vocab-size {VOCAB_SIZE - 20} --requests 5 "
            "--requests-at-once --max-concurrency 2 --prompt-tokens 12 --output-tokens 5"
        )
        wrong = bench(f"serve --url {up.page}v1 --served-model-name yours --requests 2 --output-tokens 5")

    [row] = done.rows
    [(name, figure)] = row["figures"].items()
    assert name == up.page.split("/")[2]
    assert row["case"]["rate"] == "all at once"
    assert (figure["completed"], figure["output_tokens"]) == (5, 25)
    assert all(figure[name] > 0 for name in PERCENTILES)
    [figure] = wrong.rows[0]["figures"].values()
    assert "the server answered 404" in figure["error"]


def test_both_ways(bench):
    """The same requests in process and through the pool, with what the road may cost as the goal."""
    done = bench("compare --shape tiny --requests 4 --prompt-tokens 12 --output-tokens 5")

    rows = {row["measure"]: row for row in done.rows}
    assert list(rows) == ["throughput", "latency", "compare throughput", "compare first token"]
    rate, first = (rows[name]["figures"]["headrace"]["value"] for name in ("throughput", "latency"))
    through = rows["compare throughput"]["figures"]["headrace"]
    assert through["in_process"] == rate
    assert (through["completed"], through["output_tokens"]) == (4, 20)
    assert through["compilations"] == 0
    assert rows["compare throughput"]["limit"] == rows["throughput"]["limit"] > 0
    assert rows["compare first token"]["limit"] == rows["latency"]["limit"] > 0
    assert rows["compare throughput"]["goal"] == pytest.approx(0.97 * rate, rel=DIGITS)
    assert rows["compare first token"]["goal"] == pytest.approx(first + 2.0, rel=DIGITS)
    assert "in process" in done.output
    assert "met" in done.output or "missed" in done.output


def test_everything(bench):
    """For a decoder and an encoder; a part that is not about a model leaves it out. What is not named here is above."""
    done = bench("all --shape tiny --shape tiny-bert --no-peers --only prefill --only decode")

    measured = [(row["measure"], row["model"]) for row in done.rows]
    assert measured == [("decode", "tiny"), ("encode", "tiny-bert"), ("prefill", "tiny"), ("throughput", "tiny")]
    assert not [row for row in done.rows for figure in row["figures"].values() if "error" in figure]


def test_the_time_is_over(bench):
    """What was not begun is not measured; that is said, and is no failure."""
    done = bench("all --shape tiny --only decode --budget 0.001")

    assert done.rows == []
    assert "The time is over" in done.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("serve --shape tiny-bert", "tiny-bert is an encoder"),
        ("serve --url http://127.0.0.1:1", "--served-model-name"),
        ("serve --url 127.0.0.1:1 --served-model-name a", "is no URL"),
    ],
)
def test_wrong_values_are_named(words, expected):
    result = CliRunner().invoke(cli, ["bench", *words.split()])

    assert result.exit_code == 2, result.output
    assert expected in result.output
