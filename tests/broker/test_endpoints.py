"""Taking an address: what is in use, whose it is, what a dead broker left, and what is not ours to remove."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys

import pytest

from headrace.broker.owners import port_owner, socket_owner
from headrace.broker.serve import BrokerServer
from headrace.errors import AddressError
from tests.broker.raw import PATIENCE, Peer, Serving


def bind(clients: str, workers: str) -> str:
    """What a broker says that cannot have its addresses."""
    server = BrokerServer(clients, workers)
    with pytest.raises(AddressError) as caught:
        server.bind()
    return caught.value.message


@contextlib.contextmanager
def another_process(script: str, *args: str):
    """A process that has something, until the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{script}\nprint('ready', flush=True)\nimport sys; sys.stdin.read()", *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.communicate(timeout=PATIENCE)


BROKER = """
import sys
from headrace.broker.serve import BrokerServer
server = BrokerServer(*sys.argv[1:3])
server.bind()
"""


def test_a_socket_in_use_names_the_broker_that_has_it(run_dir):
    clients, workers = f"ipc://{run_dir}/c.sock", f"ipc://{run_dir}/w.sock"
    with another_process(BROKER, clients, workers) as other:
        message = bind(clients, f"ipc://{run_dir}/w2.sock")
        assert f"process id {other.pid}" in message
        assert clients in message
        assert f"process id {other.pid}" in bind(f"ipc://{run_dir}/c2.sock", workers)
        assert (run_dir / "c.sock").is_socket()
        assert not (run_dir / "c2.sock").exists()  # what was taken already is given up again
    with Serving(clients, workers):
        pass


def test_a_port_in_use_names_the_process_that_has_it(run_dir):
    script = "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen()"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with another_process(script, str(port)) as other:
        message = bind(f"tcp://127.0.0.1:{port}", f"ipc://{run_dir}/w.sock")
        assert str(other.pid) in message
        assert str(port) in message
        assert port_owner(port) == other.pid
    assert port_owner(port) is None


def test_a_socket_that_another_program_listens_on_is_left_alone(run_dir):
    """It has no lock of ours, and is no dead broker's all the same."""
    path = run_dir / "c.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert str(os.getpid()) in bind(f"ipc://{path}", f"ipc://{run_dir}/w.sock")
        assert path.is_socket()
        assert socket_owner(path) == os.getpid()
    assert socket_owner(path) is None
    with Serving(f"ipc://{path}", f"ipc://{run_dir}/w.sock") as serving, Peer(serving.clients) as peer:
        peer.greet()


def test_a_socket_file_that_nobody_answers_at_is_replaced(run_dir):
    path = run_dir / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with Serving(f"ipc://{path}", f"ipc://{run_dir}/w.sock") as serving, Peer(serving.clients) as peer:
        peer.greet()


def test_a_file_that_is_no_socket_is_refused_and_kept(run_dir):
    """It was once removed on the way out of the error that says that it is in the way."""
    path = run_dir / "c.sock"
    path.write_text("a letter")
    assert "is no socket" in bind(f"ipc://{path}", f"ipc://{run_dir}/w.sock")
    assert path.read_text() == "a letter"


@pytest.mark.parametrize("folder", ["file/below", "/proc/headrace"])
def test_a_folder_that_cannot_be_written_is_named(run_dir, folder):
    (run_dir / "file").write_text("")
    wrong = run_dir / folder
    message = bind(f"ipc://{wrong}/c.sock", f"ipc://{run_dir}/w.sock")
    assert str(wrong) in message
    assert "HEADRACE_RUNTIME_DIR" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(run_dir):
    run_dir.chmod(0o500)
    try:
        assert "Permission denied" in bind(f"ipc://{run_dir}/c.sock", f"ipc://{run_dir}/w.sock")
    finally:
        run_dir.chmod(0o700)


def test_an_address_of_another_machine_cannot_be_had(run_dir, monkeypatch):
    monkeypatch.setattr("headrace.addresses.is_loopback", lambda host: True)
    assert "Cannot listen on" in bind("tcp://192.0.2.1:5555", f"ipc://{run_dir}/w.sock")


def test_sockets_are_for_their_owner_only_and_gone_afterwards(run_dir):
    before = os.umask(0)
    try:
        with Serving(f"ipc://{run_dir}/sub/c.sock", f"ipc://{run_dir}/sub/w.sock"):
            assert stat.S_IMODE((run_dir / "sub").stat().st_mode) == 0o700
            for name in ("c.sock", "w.sock", "c.sock.lock", "w.sock.lock"):
                assert stat.S_IMODE((run_dir / "sub" / name).stat().st_mode) == 0o600
            assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert sorted(path.name for path in (run_dir / "sub").iterdir()) == ["c.sock.lock", "w.sock.lock"]


def test_both_faces_at_one_address_are_refused(run_dir):
    assert "in use" in bind(f"ipc://{run_dir}/x.sock", f"ipc://{run_dir}/x.sock")
