"""Real processes, real kills: whatever dies, the stream goes on exactly, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from headrace.errors import WorkerCrashedError
from headrace.processes import Child
from tests.support.children import LIMIT, gone, wait_until
from tests.support.worker_pool import expected, fake_spec, read_stream, serve_groups

ROOT = Path(__file__).parents[2]


def at(position, act):
    """Do something when a stream has so many tokens, once."""
    done = []

    def on_token(seen):
        if seen >= position and not done:
            done.append(seen)
            act()

    return on_token


# ----------------------------------------------------------------------------------------------------- deaths of ranks


def test_sigkill_of_the_leader_mid_stream(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, step_delay=0.01))
    first = groups.pid("a")
    tokens = pool.read(5, 120, at(30, lambda: groups.kill("a")))
    assert tokens == expected(5, 120)
    assert groups.kinds("a") == ["starting", "warming", "ready", "lost", "restarting", "starting", "warming", "ready"]
    assert "SIGKILL" in groups.event("a", "lost").text
    assert groups.pid("a") != first


def test_with_another_group_the_stream_does_not_wait_for_the_restart(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, "a", step_delay=0.01), fake_spec(run_dir, "b", step_delay=0.01))
    tokens = pool.read(6, 150, at(30, lambda: groups.kill("a")))
    assert tokens == expected(6, 150)
    groups.wait_for("a", "ready", 2)
    assert groups.kinds("b") == ["starting", "warming", "ready"]


def test_sigkill_of_a_follower_ends_the_whole_group(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, ranks=3, step_delay=0.01))
    before = [groups.pid("a", rank) for rank in range(3)]
    tokens = pool.read(7, 120, at(30, lambda: groups.kill("a", 2)))
    assert tokens == expected(7, 120)
    assert gone(before)
    assert "rank 2" in groups.event("a", "lost").text


def test_three_ranks_make_the_same_calls_in_processes_of_their_own(pool, run_dir):
    pool.start_broker()
    spec = fake_spec(run_dir, ranks=3, log=True)
    groups = pool.start_groups(spec)
    prompts = [[1, 2, 3], [99_999], [4]]
    items = list(pool.client.map(prompts, seed=9, max_tokens=20, ignore_eos=True))
    assert [item.error is None for item in items] == [True, False, True]
    with pool.client.stream(token_ids=[5], max_tokens=4000, seed=1) as stream:
        next(stream)  # closing it revokes
    pool.wait_for(lambda report: report["requests"]["live"] == 0)
    groups.launcher.stop(LIMIT)
    groups.thread.join(LIMIT)
    logs = [(spec.folder / f"calls-a-{rank}.jsonl").read_text().splitlines() for rank in range(3)]
    assert logs[0] == logs[1] == logs[2]
    assert {line.split('"')[1] for line in logs[0]} >= {"add", "step", "revoke"}


def test_a_rank_that_computes_something_else_takes_its_group_down(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, ranks=2, step_delay=0.001, diverge="a/1"))
    with pool.client.stream(token_ids=[1], max_tokens=2000, seed=1) as stream:
        next(stream)
        groups.wait_for("a", "lost")
    assert "computed something else than its leader" in groups.event("a", "lost").error.message


def test_an_exception_in_a_step_is_reported_and_the_stream_goes_on(pool, run_dir, capfd):
    pool.start_broker()
    spec = fake_spec(run_dir, step_delay=0.01)
    groups = pool.start_groups(spec)
    tokens = pool.read(8, 120, at(30, (spec.folder / "fail").touch))
    assert tokens == expected(8, 120)
    assert "ZeroDivisionError: a step that fails" in groups.event("a", "lost").error.message
    assert "_misbehave" in capfd.readouterr().err  # the traceback


def test_a_request_that_takes_its_group_down_ends_with_an_error_and_the_group_comes_back(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, step_delay=0.001, exit_at_token=77))
    with pytest.raises(WorkerCrashedError):
        pool.client.generate(token_ids=[77, 1], max_tokens=5)
    groups.wait_for("a", "restarting", 2)
    assert pool.read(3, 20) == expected(3, 20)


# -------------------------------------------------------------------------------------------------- stopped processes


def test_a_stopped_leader_is_replaced_and_its_late_tokens_are_dropped(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, "a", step_delay=0.01), fake_spec(run_dir, "b", step_delay=0.01))
    tokens = pool.tokens(9, 200, at(30, lambda: groups.kill("a", number=signal.SIGSTOP)))
    got = [next(tokens) for _ in range(100)]  # so it went on elsewhere
    assert "a" not in [group["name"] for group in pool.client.status()["groups"]]
    groups.kill("a", number=signal.SIGCONT)
    got += tokens
    assert got == expected(9, 200)
    pool.wait_for(lambda report: pool.group("a", report).get("state") == "ready")
    assert groups.kinds("a") == ["starting", "warming", "ready"]  # the same process said hello again
    assert pool.read(10, 50) == expected(10, 50)


def test_a_leader_that_stays_stopped_is_ended_by_the_launcher(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, step_delay=0.01), leader_silence=2.0)
    tokens = pool.read(11, 100, at(30, lambda: groups.kill("a", number=signal.SIGSTOP)))
    assert tokens == expected(11, 100)
    assert "said nothing" in groups.event("a", "lost").text


def test_a_stopped_follower_shows_as_a_group_without_progress(pool, run_dir):
    """The leader waits for it in the plan's pipe; its heartbeats go on, its steps do not."""
    pool.start_broker(heartbeat=0.25, progress_timeout=2.0)
    groups = pool.start_groups(
        fake_spec(run_dir, "a", ranks=2, step_delay=0.0), fake_spec(run_dir, "b", step_delay=0.0), hung_after=4.0
    )
    tokens = pool.read(12, 4000, at(10, lambda: groups.kill("a", 1, signal.SIGSTOP)))
    assert tokens == expected(12, 4000)
    assert pool.client.status()["counters"]["redispatch_total"] == {"hung": 1}
    groups.wait_for("a", "ready", 2)
    assert "made no step" in groups.event("a", "lost").text


def test_a_long_step_keeps_its_heartbeat_and_loses_nothing(pool, run_dir):
    pool.start_broker()
    spec = fake_spec(run_dir, step_delay=0.01)
    groups = pool.start_groups(spec)
    hang = spec.folder / "hang"
    tokens = pool.tokens(13, 60, lambda seen: None)
    got = [next(tokens) for _ in range(20)]
    hang.touch()
    # Three times as long as a leader may be silent.
    pool.wait_for(lambda report: pool.group("a", report)["step_age_seconds"] > 3.0)
    assert pool.group("a")["heartbeat_age_seconds"] < 1.0
    hang.unlink()
    got += tokens
    assert got == expected(13, 60)
    assert pool.client.status()["counters"]["redispatch_total"] == {}
    assert groups.kinds("a") == ["starting", "warming", "ready"]


# ------------------------------------------------------------------------------------------------ broker and launcher


def test_a_broker_that_is_killed_and_started_again(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, step_delay=0.01))

    def restart():
        pool.kill_broker()
        pool.start_broker()

    assert pool.read(14, 120, at(30, restart)) == expected(14, 120)
    assert groups.kinds("a") == ["starting", "warming", "ready"]  # the same process, another hello
    assert pool.read(15, 20) == expected(15, 20)


def test_a_broker_that_was_stopped_for_a_while(pool, run_dir):
    """Longer than any silence it would forgive itself; the group computes on and nothing is computed twice."""
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, step_delay=0.01))
    steps = []

    def pause():
        os.kill(pool.broker.pid, signal.SIGSTOP)
        before = psutil.Process(groups.pid("a")).cpu_times()
        wait_until(lambda: psutil.Process(groups.pid("a")).cpu_times() != before, "the group computes")
        steps.append(before)
        os.kill(pool.broker.pid, signal.SIGCONT)

    assert pool.read(16, 120, at(30, pause)) == expected(16, 120)
    assert pool.client.status()["counters"]["redispatch_total"] == {}
    assert groups.kinds("a") == ["starting", "warming", "ready"]


def test_a_broker_that_ends_in_good_order_and_comes_back(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, step_delay=0.01))
    pool.broker.terminate(LIMIT)
    pool.start_broker()
    assert pool.read(17, 20) == expected(17, 20)
    assert "lost" not in groups.kinds("a")


def test_sigkill_of_the_launcher_leaves_no_orphan(pool, run_dir):
    pool.start_broker()
    specs = [fake_spec(run_dir, "a", ranks=2), fake_spec(run_dir, "b", load_steps=0)]
    launcher = Child(
        "launcher", serve_groups, {"specs": [s.to_wire() for s in specs], "endpoint": pool.worker_endpoint}
    )
    with launcher:
        pids = launcher.wait_ready(LIMIT)["pids"]
        assert len(pids) == 3
        launcher.kill()
        wait_until(lambda: gone(pids), "the ranks are gone")


PROGRAM = """
import json, sys
from headrace.processes import Child
from tests.support.worker_pool import serve_groups

if __name__ == "__main__":
    child = Child("launcher", serve_groups, json.loads(sys.argv[1])).start()
    print(child.pid, *child.wait_ready(60)["pids"], flush=True)
    child.join()
"""


def test_sigkill_of_the_launcher_s_parent_leaves_no_orphan(pool, run_dir):
    """Two levels: a program, its launcher, and ranks, one of which hangs in a step."""
    pool.start_broker()
    spec = fake_spec(run_dir, "a", ranks=2, step_delay=0.01)
    (run_dir / "program.py").write_text(PROGRAM)
    arguments = {"specs": [spec.to_wire()], "endpoint": pool.worker_endpoint}
    program = subprocess.Popen(
        [sys.executable, run_dir / "program.py", json.dumps(arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 3
        (spec.folder / "hang").touch()
        stream = pool.client.stream(token_ids=[1], max_tokens=100)
        tree = [process.pid for process in psutil.Process(program.pid).children(recursive=True)]
        assert set(pids) <= set(tree)
        program.kill()
        wait_until(lambda: gone(tree), "the whole tree is gone")
        stream.close()
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def test_a_client_that_is_killed_frees_its_rows(pool, run_dir):
    pool.start_broker()
    spec = fake_spec(run_dir, step_delay=0.01, log=True)
    pool.start_groups(spec)
    with Child("client", read_stream, {"endpoint": pool.endpoint, "seed": 1, "count": 4000}) as reader:
        reader.wait_ready(LIMIT)
        reader.kill()
        log = spec.folder / "calls-a-0.jsonl"
        wait_until(lambda: '"revoke"' in log.read_text(), "the engine was told")
        pool.wait_for(lambda report: pool.group("a", report)["load"].get("running") == 0)
