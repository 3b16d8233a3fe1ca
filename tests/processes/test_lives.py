"""Groups from their start to their end: failures while loading, restarts, draining, and what people are told."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from headrace.errors import AddressError, ConfigError, InternalError, ModelFilesError
from headrace.workers.launcher import Launcher
from tests.support.children import LIMIT, gone, wait_until
from tests.support.worker_pool import Groups, expected, fake_spec

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launch(pool):
    """Start groups that may never become ready."""
    started = []

    def start(*specs, endpoint=None, **limits):
        started.append(Groups(list(specs), endpoint or pool.worker_endpoint, **limits))
        return started[-1]

    yield start
    for groups in started:
        groups.close()


# ------------------------------------------------------------------------------------------------------------- starts


def test_people_hear_how_far_the_loading_is(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, load_steps=7))
    loading = [(event.done, event.total) for event in groups.events if event.kind == "loading"]
    assert loading[-1] == (7, 7)
    assert [done for done, _ in loading] == sorted(done for done, _ in loading)
    assert groups.kinds("a") == ["starting", "warming", "ready"]
    start = groups.event("a", "ready").start
    assert [phase.name for phase in start.phases] == ["imports", "weights", "memory", "kernels", "broker"]
    assert all(phase.seconds >= 0 for phase in start.phases)
    assert all(event.text for event in groups.events)


def test_a_group_waits_for_a_broker_that_starts_later(pool, run_dir, launch):
    groups = launch(fake_spec(run_dir))
    groups.wait_for("a", "warming", 2)
    assert "broker" in groups.event("a", "warming").text
    pool.start_broker()
    groups.wait_for("a", "ready")
    assert pool.read(1, 10) == expected(1, 10)


def test_a_model_that_cannot_be_loaded_fails_once_and_for_all(run_dir, launch):
    groups = launch(fake_spec(run_dir, "a", error="files"))
    groups.thread.join(LIMIT)  # nothing is left to supervise
    assert not groups.thread.is_alive()
    assert groups.kinds("a") == ["starting", "failed"]
    error = groups.event("a", "failed").error
    assert isinstance(error, ModelFilesError)
    assert error.param == "folder"
    assert "7 bytes short" in groups.event("a", "failed").text
    assert groups.launcher.failures == {"a": error}


def test_what_a_rank_said_is_heard_though_it_has_ended_since(run_dir):
    kinds = []
    spec, endpoint = fake_spec(run_dir, error="files"), f"ipc://{run_dir}/none"
    with Launcher([spec], endpoint, on_event=lambda event: kinds.append(event.kind)) as launcher:
        launcher.start()
        [pid] = launcher.pids["a"].values()
        wait_until(lambda: gone([pid]), "it ends before anybody listens")
        launcher.run()
        assert isinstance(launcher.failures["a"], ModelFilesError)
    assert [kind for kind in kinds if kind != "loading"] == ["starting", "failed"]


def test_a_group_that_failed_does_not_disturb_its_neighbours(pool, run_dir, launch):
    pool.start_broker()
    groups = launch(fake_spec(run_dir, "a", error="files"), fake_spec(run_dir, "b"))
    groups.wait_for("a", "failed")
    groups.wait_for("b", "ready")
    assert pool.read(2, 10) == expected(2, 10)


def test_one_rank_that_cannot_load_ends_all_ranks(run_dir, launch):
    groups = launch(fake_spec(run_dir, ranks=3, error="files"))
    groups.thread.join(LIMIT)
    assert groups.kinds("a") == ["starting", "failed"]
    assert groups.launcher.pids == {"a": {}}


@pytest.mark.parametrize(("error", "text"), [("bug", "ZeroDivisionError: while loading"), ("exit", "code 9")])
def test_a_start_that_failed_for_another_reason_is_tried_again(run_dir, launch, error, text):
    groups = launch(fake_spec(run_dir, error=error))
    groups.wait_for("a", "lost", 2)
    lost = groups.event("a", "lost")
    assert text in lost.text
    assert (lost.error is None) == (error == "exit")
    delays = [event.text for event in groups.events if event.kind == "restarting"]
    assert delays[0] == "starts again in 0.5 s"
    assert groups.launcher.failures == {}


def test_a_package_that_is_missing_is_named(run_dir, launch):
    spec = fake_spec(run_dir)
    (run_dir / "needs_missing.py").write_text("import surely_not_installed\n\n\ndef load():\n    pass\n")
    sys.path.insert(0, str(run_dir))  # children look where their parent does
    try:
        groups = launch(type(spec)(**{**spec.to_wire(), "config": spec.config, "engine": "needs_missing:load"}))
        groups.wait_for("a", "failed")
    finally:
        sys.path.remove(str(run_dir))
    assert "surely_not_installed" in groups.event("a", "failed").text
    assert "headrace[serve]" in groups.event("a", "failed").text


def test_an_endpoint_that_is_none_is_final(run_dir, launch):
    groups = launch(fake_spec(run_dir), endpoint="carrier://pigeon")
    groups.wait_for("a", "failed")
    assert isinstance(groups.event("a", "failed").error, AddressError)


def test_a_file_in_place_of_the_model_is_named(run_dir, launch):
    spec = fake_spec(run_dir)
    (spec.folder / "fake.json").write_text("{")
    groups = launch(spec)
    groups.wait_for("a", "lost")
    assert isinstance(groups.event("a", "lost").error, InternalError)


def test_groups_need_names_of_their_own(run_dir):
    spec = fake_spec(run_dir)
    with pytest.raises(ConfigError, match="names of their own"):
        Launcher([spec, spec], "ipc:///nowhere")
    with pytest.raises(ConfigError, match="none"):
        Launcher([], "ipc:///nowhere")


# ---------------------------------------------------------------------------------------------------------------- ends


def test_stopping_lets_the_stream_finish(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, ranks=2, step_delay=0.01))
    pids = list(groups.launcher.pids["a"].values())
    tokens = pool.tokens(20, 80, lambda seen: None)
    got = [next(tokens) for _ in range(10)]
    groups.launcher.stop(LIMIT)
    got += tokens
    assert got == expected(20, 80)
    groups.thread.join(LIMIT)
    assert groups.kinds("a")[-1] == "stopped"
    assert "lost" not in groups.kinds("a")
    assert gone(pids)
    pool.wait_for(lambda report: report["groups"] == [])
    assert pool.client.status()["counters"]["redispatch_total"] == {}


def test_what_does_not_finish_in_time_goes_on_elsewhere(pool, run_dir):
    pool.start_broker()
    first = pool.start_groups(fake_spec(run_dir, "a", step_delay=0.02))
    tokens = pool.tokens(21, 100, lambda seen: None)
    got = [next(tokens) for _ in range(10)]
    pool.start_groups(fake_spec(run_dir, "b", step_delay=0.001))
    first.launcher.stop(0.1)
    got += tokens
    assert got == expected(21, 100)
    first.thread.join(LIMIT)
    assert first.kinds("a")[-1] == "stopped"
    assert pool.client.status()["counters"]["redispatch_total"] == {"drained": 1}


def test_sigterm_of_a_leader_drains_it_and_it_comes_back(pool, run_dir):
    """A restart by hand: `kill` of the process that `ps` shows."""
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, step_delay=0.01))
    tokens = pool.tokens(22, 60, lambda seen: None)
    got = [next(tokens) for _ in range(10)]
    groups.kill("a", number=signal.SIGTERM)
    got += tokens
    assert got == expected(22, 60)
    groups.wait_for("a", "ready", 2)
    assert "ended with code 0" in groups.event("a", "lost").text
    assert pool.client.status()["counters"]["redispatch_total"] == {}


def test_a_second_sigterm_ends_a_leader_at_once(pool, run_dir):
    pool.start_broker()
    spec = fake_spec(run_dir, step_delay=0.01)
    groups = pool.start_groups(spec)
    tokens = pool.tokens(24, 60, lambda seen: None)
    got = [next(tokens) for _ in range(10)]
    (spec.folder / "hang").touch()
    pool.wait_for(lambda report: pool.group("a", report)["step_age_seconds"] > 0.5)
    first = groups.pid("a")

    def ask_again():
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGTERM)
        return gone([first])

    wait_until(ask_again, "it ends within a step that hangs")
    (spec.folder / "hang").unlink()
    got += tokens
    assert got == expected(24, 60)
    assert "SIGTERM" in groups.event("a", "lost").text


def test_a_second_stop_ends_at_once(pool, run_dir):
    pool.start_broker()
    spec = fake_spec(run_dir, step_delay=0.01)
    groups = pool.start_groups(spec)
    stream = pool.client.stream(token_ids=[1], max_tokens=4000)
    next(stream)
    (spec.folder / "hang").touch()  # it could not drain if it wanted to
    groups.launcher.stop(600.0)
    groups.launcher.stop(600.0)
    groups.thread.join(LIMIT)
    assert groups.kinds("a")[-1] == "stopped"
    stream.close()


def test_stopping_while_a_group_loads(run_dir, launch):
    groups = launch(fake_spec(run_dir))
    groups.wait_for("a", "starting")
    groups.launcher.stop(600.0)
    groups.thread.join(LIMIT)
    assert groups.kinds("a")[-1] == "stopped"


def test_closing_ends_what_was_only_started(run_dir):
    launcher = Launcher([fake_spec(run_dir)], f"ipc://{run_dir}/none")
    with launcher:
        launcher.start()
        [pid] = launcher.pids["a"].values()
    assert gone([pid])
    launcher.start()
    launcher.run()
    launcher.close()
    assert launcher.pids == {"a": {}}


def test_a_listener_that_fails_is_no_reason_to_stop(pool, run_dir, caplog):
    pool.start_broker()
    spec = fake_spec(run_dir)

    def on_event(event):
        raise ZeroDivisionError("in on_event")

    with Launcher([spec], pool.worker_endpoint, on_event=on_event) as launcher:
        thread = threading.Thread(target=launcher.run)
        thread.start()
        assert pool.read(23, 10) == expected(23, 10)
        launcher.stop(LIMIT)
        thread.join(LIMIT)
    assert "in on_event" in caplog.text


def test_lives_leave_nothing_open(pool, run_dir):
    pool.start_broker()
    groups = pool.start_groups(fake_spec(run_dir, ranks=2))
    before = psutil.Process().num_fds()
    for count in (2, 3):
        groups.kill("a", count % 2)
        groups.wait_for("a", "ready", count)
    wait_until(lambda: psutil.Process().num_fds() <= before, "descriptors of dead ranks are closed")


def test_the_launcher_needs_no_torch():
    code = "import sys, headrace.workers.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
