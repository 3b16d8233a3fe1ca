"""`headrace status` against a broker in a thread."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from headrace.scripts import status as module
from headrace.scripts.main import cli
from headrace.scripts.status import describe
from tests.client.pool import wait_until

REPORT = {
    "broker": "ab-1",
    "version": 1,
    "uptime_seconds": 100.0,
    "clients": 2,
    "requests": {"live": 1, "finished": 4},
    "counters": {"requests_total": 5, "tokens_total": 1000, "finished_total": {"stop": 4}, "malformed_total": {}},
    "models": [{"name": "mill", "ready_groups": 1, "queue_depth": 7, "queue_tokens": 90, "running": 3}],
    "groups": [
        {
            "name": "group-0",
            "model": "mill",
            "state": "ready",
            "running": 3,
            "max_num_seqs": 64,
            "load": {"kv_blocks_total": 8, "kv_blocks_free": 6},
            "heartbeat_age_seconds": 0.25,
            "step": 77,
        }
    ],
}


def run(*arguments):
    return CliRunner().invoke(cli, ["status", *arguments])


def test_json_is_the_whole_report(pool):
    pool.start_group()

    report = json.loads(run("--json").stdout)

    assert [group["name"] for group in report["groups"]] == ["group 0"]
    assert report["models"][0]["name"] == report["groups"][0]["model"]
    assert {"broker", "queue", "clients", "requests", "counters", "uptime_seconds"} <= report.keys()


def test_tables(pool):
    group = pool.start_group()

    result = run()

    assert result.exit_code == 0
    assert "GROUPS READY" in result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("group 0")]
    assert group.card.name in line
    assert "ready" in line


def test_broker_without_groups_says_how_to_start_one(pool):
    assert "headrace workers" in run().output


def test_no_broker_ends_with_1_in_seconds(run_dir, monkeypatch):
    monkeypatch.setenv("HEADRACE_ENDPOINT", f"ipc://{run_dir}/nobody.sock")

    result = run("--json")

    assert result.exit_code == 1
    assert "headrace up" in result.stderr
    assert result.stdout == ""


def test_watch_goes_on_until_ctrl_c(pool, monkeypatch):
    rounds = []

    def sleep(seconds):
        rounds.append(seconds)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))

    result = run("--watch", "--interval", "0.5", "--json")

    assert result.exit_code == 0
    assert rounds == [0.5, 0.5, 0.5]
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == 3


def test_watch_outlasts_the_broker(pool, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 1:
            pool.stop_broker()
        elif len(pauses) == 2:
            pool.start_broker()
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))

    result = run("--watch", "--interval", "7", "--json")

    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    # Its last words may be heard only when the next question is asked, and are then the answer.
    assert "no broker" in result.stderr or "The broker is stopping" in result.stderr


def test_report_in_lines():
    lines = describe(REPORT)

    assert lines[0] == "broker ab-1, up 100 s, 2 connections"
    assert lines[1] == "requests: 1 live, 5 in all; tokens: 1000"
    assert lines[3].split() == ["MODEL", "GROUPS", "READY", "RUNNING", "QUEUED", "QUEUED", "TOKENS"]
    assert lines[4].split() == ["mill", "1", "3", "7", "90"]
    assert lines[7].split() == ["group-0", "mill", "ready", "3", "of", "64", "25%", "77", "0.2", "s", "ago"]
    assert lines[-1] == "finished stop 4"


@pytest.mark.parametrize(("seconds", "expected"), [(3.0, "3 s"), (600, "10 min"), (7500, "2 h 5 min")])
def test_spans_of_time(seconds, expected):
    assert f"up {expected}," in describe(REPORT | {"uptime_seconds": seconds})[0]


def test_rate_counts_from_the_report_before():
    later = REPORT | {"uptime_seconds": 110.0, "counters": REPORT["counters"] | {"tokens_total": 1500}}

    assert "tokens: 1500, 50.0 a second" in describe(later, REPORT)[1]
    assert "a second" not in describe(later | {"broker": "ab-2"}, REPORT)[1], "another broker counts from zero"


def test_names_cannot_move_the_cursor():
    """Names come from whoever runs the groups."""
    groups = [REPORT["groups"][0] | {"name": "\x1b[2Jgroup\n-1"}]

    assert "\x1b" not in "\n".join(describe(REPORT | {"groups": groups}))


def test_counts_move(pool):
    from headrace.client import Client

    pool.start_group()
    with Client() as client:
        client.generate("a", max_tokens=3)
        wait_until(lambda: json.loads(run("--json").stdout)["counters"]["finished_total"] == {"length": 1})
