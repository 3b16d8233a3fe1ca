"""Children that never outlive their parent, with real processes and real kills."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from headrace.errors import InternalError, ModelFilesError
from headrace.processes import Child, describe_exit, parent
from tests.support import children
from tests.support.children import LIMIT, gone, wait_until

ROOT = Path(__file__).parents[2]


def test_words_cross_the_pipe_both_ways_and_the_end_is_seen():
    with Child("echo", children.echo, {"colour": "blue", "sizes": [1, 2]}) as child:
        assert child.exitcode is None
        ready = child.wait_ready(LIMIT)
        assert ready == {"kind": "ready", "pid": child.pid, "colour": "blue", "sizes": [1, 2]}
        assert child.alive
        child.send("hello", data=b"\x00\xff")
        assert child.receive(LIMIT) == {"kind": "echo", "message": {"kind": "hello", "data": b"\x00\xff"}}
        assert child.receive() is None
        assert not child.closed
        child.send("stop")
        assert child.join(LIMIT) == 0
        assert child.receive(LIMIT) is None
        assert child.closed
        assert not child.alive
        child.send("too late")  # nobody hears it
        child.kill()
        assert child.terminate() == 0


def test_an_error_comes_back_with_its_type():
    with Child("failing", children.fail) as child:
        with pytest.raises(ModelFilesError, match="7 bytes short") as caught:
            child.wait_ready(LIMIT)
        assert caught.value.param == "folder"
        assert child.join(LIMIT) == 1


def test_an_unforeseen_error_is_named_and_its_traceback_logged(capfd):
    with Child("failing", children.fail_unforeseen) as child:
        with pytest.raises(InternalError, match="ZeroDivisionError: one by nothing"):
            child.wait_ready(LIMIT)
        assert child.join(LIMIT) == 1
    assert "fail_unforeseen" in capfd.readouterr().err


@pytest.mark.parametrize(("target", "code", "kwargs"), [("end_silently", 0, {}), ("exit_with", 7, {"code": 7})])
def test_a_child_that_ends_without_a_word_is_not_waited_for(target, code, kwargs):
    with Child("mute", getattr(children, target), kwargs) as child:
        with pytest.raises(InternalError, match=f"'mute' ended with code {code} before it was ready"):
            child.wait_ready(LIMIT)
        assert child.exitcode == code


def test_a_child_that_takes_too_long_is_reported():
    with Child("slow", children.lose_kernel_help) as child, pytest.raises(InternalError, match="not ready after 0 s"):
        child.wait_ready(0.0)


def test_terminate_asks_first_and_forces_then():
    with Child("polite", children.echo) as polite, Child("stubborn", children.ignore_sigterm) as stubborn:
        polite.wait_ready(LIMIT)
        stubborn.wait_ready(LIMIT)
        assert polite.terminate(LIMIT) == -signal.SIGTERM
        assert stubborn.terminate(0.2) == -signal.SIGKILL
        assert "was ended by SIGKILL" in repr(stubborn)


def test_a_stopped_child_can_be_ended():
    with Child("stopped", children.echo) as child:
        child.wait_ready(LIMIT)
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED, "it stops")
        assert child.terminate(0.2) == -signal.SIGKILL


def test_a_child_that_dies_without_reading_what_it_was_told():
    """The kernel then says "connection reset", where it says "end of file" otherwise."""
    with Child("deaf", children.ignore_sigterm) as child:
        child.send("hello")
        child.wait_ready(LIMIT)
        child.kill()
        child.join(LIMIT)
        assert child.receive(LIMIT) is None
        assert child.closed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_terminal_does_not_reach_children(number):
    with Child("echo", children.echo) as child:
        for _ in range(100):  # from its first instruction on
            os.kill(child.pid, number)
        child.wait_ready(LIMIT)
        os.kill(child.pid, number)
        child.send("still there?")
        assert child.receive(LIMIT) is not None


def test_a_start_that_fails_fails_where_it_was_asked_for():
    with Child("echo", children.echo) as child, pytest.raises(AssertionError, match="twice"):
        child.start()
    with pytest.raises(TypeError, match="pickle"):
        Child("echo", children.echo, {"lock": threading.Lock()}).start()
    with Child("echo", children.echo) as child:
        child.wait_ready(LIMIT)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems show the program's name")
def test_the_name_shows():
    with Child("hr: tiny/rank 0", children.echo) as child:
        child.wait_ready(LIMIT)
        assert Path(f"/proc/{child.pid}/comm").read_text() == "hr: tiny/rank 0\n"


def test_a_child_outlives_the_thread_that_started_it():
    """Linux sends the parent-death signal when the starting thread ends, not the process."""
    child = Child("echo", children.echo)
    try:
        thread = threading.Thread(target=lambda: child.start().wait_ready(LIMIT))
        thread.start()
        thread.join(LIMIT)
        wait_until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists(), "the kernel's thread is gone")
        child.send("still there?")
        assert child.receive(LIMIT) == {"kind": "echo", "message": {"kind": "still there?"}}
    finally:
        child.terminate()


SCRIPT = """
import sys
from headrace.processes import Child
from tests.support import children

if __name__ == "__main__":
    child = Child("nest", children.nest, {"kinds": sys.argv[2:]}).start()
    print(*child.wait_ready(60)["pids"], flush=True)
    if sys.argv[1] == "wait":
        child.join()
"""


@pytest.fixture
def run_tree(tmp_path):
    """Start a program that starts a child that starts children; it prints their process ids."""
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    programs = []

    def run(then, *kinds):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        program = subprocess.Popen([sys.executable, script, then, *kinds], stdout=subprocess.PIPE, text=True, env=env)
        programs.append(program)
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 1 + len(kinds)
        return program, pids

    yield run
    for program in programs:
        program.kill()
        program.wait()
        program.stdout.close()


def test_no_orphan_when_the_parent_is_killed(run_tree):
    """Two levels: a program, its child, and grandchildren, one of which hangs with the interpreter's lock held."""
    program, pids = run_tree("wait", "echo", "hang", "lose_kernel_help")
    tree = [p.pid for p in psutil.Process(program.pid).children(recursive=True)]
    assert set(pids) < set(tree)  # and the helpers of multiprocessing
    program.kill()
    wait_until(lambda: gone(tree), "the whole tree is gone")


def test_no_orphan_when_the_middle_is_killed(run_tree):
    program, (middle, *leaves) = run_tree("wait", "echo", "hang", "lose_kernel_help")
    os.kill(middle, signal.SIGKILL)
    wait_until(lambda: gone(leaves), "the grandchildren are gone")
    assert program.wait(LIMIT) == 0  # it joined its child


def test_a_program_that_just_ends_takes_its_children_along(run_tree):
    program, pids = run_tree("end", "echo", "lose_kernel_help")
    assert program.wait(LIMIT) == 0
    wait_until(lambda: gone(pids), "the children are gone")


def test_children_leave_nothing_open():
    def once():
        with Child("echo", children.echo) as child:
            child.wait_ready(LIMIT)

    once()  # the first one starts helpers that stay
    before = psutil.Process().num_fds()
    for _ in range(3):
        once()
    assert psutil.Process().num_fds() == before


def test_this_process_has_no_parent_of_ours():
    assert parent() is None


def test_importing_is_light():
    code = "import sys, headrace.processes; sys.exit('torch' in sys.modules or 'zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_exits_in_words():
    assert describe_exit(0) == "ended with code 0"
    assert describe_exit(-signal.SIGSEGV) == "was ended by SIGSEGV"
    assert "memory" in describe_exit(-signal.SIGKILL)
    assert describe_exit(-99) == "was ended by 99"
    assert describe_exit(None) == "runs"
