"""A real broker on real sockets: streams, farewells, peers that do not read, and nothing that listens to strangers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import zmq

from headrace.broker.config import BrokerConfig
from headrace.broker.events import SendBlocked
from headrace.broker.serve import BrokerServer
from headrace.errors import AddressError, InternalError, UnavailableError, UnsupportedVersionError, from_wire
from headrace.messages import (
    Ack,
    Attach,
    Cards,
    Describe,
    Error,
    GetStatus,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Hello,
    Ping,
    Pong,
    Reset,
    Submit,
    Welcome,
)
from tests.broker.raw import PATIENCE, Leader, Peer, Serving, Stream, alive, ask
from tests.support.children import wait_until
from tests.support.fake_group import FakeGroup, emit_by_seed, fake_card

PLACES = {
    "ipc": lambda folder: (f"ipc://{folder}/c.sock", f"ipc://{folder}/w.sock"),
    "tcp": lambda folder: ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
    "localhost": lambda folder: ("tcp://localhost:0", "tcp://localhost:0"),
}


@pytest.fixture(params=["ipc", "tcp"])
def broker(request, run_dir):
    with Serving(*PLACES[request.param](run_dir)) as serving:
        yield serving


def text(number: int, count: int = 50) -> list[int]:
    """What a fake group says."""
    from headrace.messages import Assignment

    assignment = Assignment(request=b"", choice=0, attempt=1, prompt=b"", sampling={"seed": number})
    return [emit_by_seed(assignment, index) for index in range(count)]


@pytest.mark.parametrize("place", PLACES)
def test_a_stream_over_each_kind_of_address(place, run_dir):
    with Serving(*PLACES[place](run_dir)) as serving, FakeGroup(serving.workers):
        assert ":0" not in serving.clients
        assert ask(serving.clients, 7) == text(7)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_a_stream_over_ipv6():
    with Serving("tcp://[::1]:0", "tcp://127.0.0.1:0") as serving, FakeGroup(serving.workers):
        assert serving.clients.startswith("tcp://[::1]:")
        assert ask(serving.clients, 7) == text(7)


def test_many_clients_at_once(broker):
    answers = {}
    with FakeGroup(broker.workers, name="a"), FakeGroup(broker.workers, name="b"):
        threads = [
            threading.Thread(target=lambda n=n: answers.__setitem__(n, ask(broker.clients, n))) for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert answers == {n: text(n) for n in range(1, 9)}


def test_a_group_that_is_killed_costs_a_pause_only(broker):
    first = FakeGroup(broker.workers, name="a", step_delay=0.005).start()
    stream = Stream(3, 200)
    with Peer(broker.clients) as peer:
        peer.greet()
        peer.send(Submit(requests=(stream.request,)))
        stream.read(peer, 40)
        first.kill()
        with FakeGroup(broker.workers, name="b"):
            stream.read(peer)
    assert list(stream.tokens) == text(3, 200)
    assert stream.attempt == 2


@pytest.mark.parametrize("theirs", [0, 2])
def test_another_version_of_the_protocol_is_told_so_on_both_faces(broker, theirs):
    with Peer(broker.clients) as peer:
        peer.send(Hello(version=theirs))
        error = from_wire(peer.receive(Error).error)
    assert type(error) is UnsupportedVersionError
    with Leader(broker.workers) as leader:
        leader.send(GroupHello(group="g", card=fake_card(), max_num_seqs=1, kv_tokens=100, version=theirs))
        error = from_wire(leader.receive(Error).error)
    assert type(error) is UnsupportedVersionError
    assert f"version {theirs}" in error.message


def test_stop_tells_every_peer_and_gives_the_addresses_up(run_dir):
    clients, workers = PLACES["ipc"](run_dir)
    with Serving(clients, workers) as serving, Peer(clients) as peer, Leader(workers) as leader:
        peer.greet()
        leader.send(GroupHello(group="g", card=fake_card(), max_num_seqs=1, kv_tokens=100))
        leader.receive(GroupWelcome)
        serving.server.stop()
        assert type(from_wire(peer.receive(Error).error)) is UnavailableError
        leader.receive(Reset)
    assert not any(path.suffix == ".sock" for path in run_dir.iterdir())
    with Serving(clients, workers), Peer(clients) as peer:
        peer.greet()


def test_stop_and_close_can_be_repeated_and_come_early(run_dir):
    server = BrokerServer(*PLACES["ipc"](run_dir))
    server.bind()
    server.bind()
    server.stop()
    server.run()
    server.stop()
    server.close()
    with BrokerServer(*PLACES["ipc"](run_dir)):
        pass


@pytest.mark.parametrize("place", ["ipc", "tcp"])
def test_a_peer_that_does_not_read_for_a_while_gets_everything_in_order(place, run_dir):
    """The pipe is really full here: ROUTER says EAGAIN, and the broker keeps what it could not send."""
    config = BrokerConfig(heartbeat=PATIENCE)
    with Serving(*PLACES[place](run_dir), config) as broker, Leader(broker.workers) as leader:
        long = fake_card(special_tokens={"long": "x" * 100_000})  # so that answers fill the kernel's buffers soon
        leader.send(GroupHello(group="g", card=long, max_num_seqs=1, kv_tokens=100))
        leader.receive(GroupWelcome)
        blocked = _count(broker.server, SendBlocked)
        # Below the size of a segment on loopback (64 KiB) TCP would trickle: each piece waits for a timer that doubles.
        with Peer(broker.clients, RCVHWM=1, RCVBUF=1 << 18) as lazy, Peer(broker.clients) as other:
            lazy.greet()
            other.greet()
            count = 0
            while not blocked and count < 5000:  # that is half a gigabyte: no kernel keeps so much
                lazy.send(Describe())
                lazy.send(Ping(nonce=count))
                other.send(Ping(nonce=count))  # in step, or thousands of questions would be on their way by then
                other.receive(Pong)
                count += 1
            assert blocked
            assert alive(other)
            nonces = []
            while len(nonces) < count:
                message = lazy.receive(Pong | Cards)
                if isinstance(message, Pong):
                    nonces.append(message.nonce)
    assert nonces == list(range(count))


def _count(server, kind) -> list[object]:
    """Events of a kind that the core is told from now on."""
    seen, handle = [], server.core.handle

    def watched(event, now):
        if isinstance(event, kind):
            seen.append(event)
        return handle(event, now)

    server.core.handle = watched
    return seen


def test_a_bug_of_ours_costs_the_message_that_met_it(broker, monkeypatch, caplog):
    core = broker.server.core
    report = core.report
    with Peer(broker.clients) as peer:
        peer.greet()
        monkeypatch.setattr(core._clients, "_handlers", {**core._clients._handlers, GetStatus: lambda *_: 1 / 0})
        peer.send(GetStatus())
        assert type(from_wire(peer.receive(Error).error)) is InternalError
        assert alive(peer)
    assert "could not handle Received" in caplog.text
    assert report(0.0)["clients"] == 1


def test_addresses_beyond_this_machine_are_refused(run_dir):
    for wrong in ("tcp://0.0.0.0:0", "tcp://*:0", "ipc://@x"):
        with pytest.raises(AddressError):
            BrokerServer(wrong, f"ipc://{run_dir}/w.sock").bind()
        with pytest.raises(AddressError):
            BrokerServer(f"ipc://{run_dir}/c.sock", wrong).bind()
    assert not any(path.suffix == ".sock" for path in run_dir.iterdir())


# --------------------------------------------------------------------------------------------- processes of its own

_SCRIPT = """
import sys
from headrace.processes import die_with_parent
die_with_parent()
from headrace.broker.serve import BrokerServer
server = BrokerServer(*sys.argv[1:3])
server.bind()
print(server.client_endpoint, server.worker_endpoint, flush=True)
server.run()
"""


class Process:
    """A broker in a process."""

    def __init__(self, clients: str, workers: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, clients, workers], stdout=subprocess.PIPE, text=True, env=_environment()
        )
        assert self.child.stdout is not None
        self.clients, self.workers = self.child.stdout.readline().split()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(PATIENCE)
        self.child.stdout.close()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("place", ["ipc", "tcp"])
def test_a_broker_that_is_killed_and_restarted_costs_a_pause_only(place, run_dir):
    """A client without any library goes on by its positions, and the group that ran the stream joins again."""
    stream = Stream(5, 400)
    with Process(*PLACES[place](run_dir)) as first:
        where = first.clients, first.workers
        group = FakeGroup(first.workers, step_delay=0.005).start()
        try:
            with Peer(first.clients) as peer:
                peer.greet()
                peer.send(Submit(requests=(stream.request,)))
                stream.read(peer, 60)
            first.kill()
            with Process(*where) as second, Peer(second.clients) as peer:
                assert (second.clients, second.workers) == where
                peer.greet()
                peer.send(Attach(positions=(Ack(stream.request.id, 0, len(stream.tokens), False),)))
                assert from_wire(peer.receive(Error).error).code == "unknown_request"
                peer.send(Submit(requests=(stream.again(),)))
                stream.read(peer)
        finally:
            group.stop()
    assert list(stream.tokens) == text(5, 400)
    assert stream.attempt >= 2


def test_a_broker_that_is_stopped_and_continued_costs_a_pause_only(run_dir):
    stream = Stream(6, 300)
    with Process(*PLACES["ipc"](run_dir)) as process, FakeGroup(process.workers, step_delay=0.005) as group:
        with Peer(process.clients) as peer:
            peer.greet()
            peer.send(Submit(requests=(stream.request,)))
            stream.read(peer, 30)
            process.child.send_signal(signal.SIGSTOP)
            stopped = psutil.Process(process.child.pid)
            wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, "the broker is stopped")
            peer.send(Ping(nonce=1))
            peer.socket.poll(1500)  # longer than a tick may be late without being a pause
            process.child.send_signal(signal.SIGCONT)
            stream.read(peer)
        assert group.welcomes == 1
    assert list(stream.tokens) == text(6, 300)
    assert stream.attempt == 1


@pytest.mark.parametrize("place", ["ipc", "tcp"])
def test_a_broker_listens_to_nobody_else(place, run_dir):
    with Process(*PLACES[place](run_dir)) as process, Peer(process.clients) as peer:
        peer.greet()
        listening = [
            conn.laddr.ip
            for conn in psutil.Process(process.child.pid).net_connections(kind="inet")
            if conn.status == psutil.CONN_LISTEN
        ]
        assert listening == ([] if place == "ipc" else ["127.0.0.1"] * 2)


def test_a_broker_dies_with_its_parent_and_its_address_is_free_again(run_dir):
    clients, workers = PLACES["ipc"](run_dir)
    with Process(clients, workers) as process:
        process.kill()
        assert (run_dir / "c.sock").exists()  # nobody could clean up
        with Process(clients, workers) as second, Peer(second.clients) as peer:
            peer.greet()


def test_a_heartbeat_counts_whatever_the_face(broker):
    """A leader's words are none that a client may say, and the reverse."""
    with Peer(broker.clients) as peer:
        peer.greet()
        peer.send(Heartbeat(step=1, busy=False))
        assert "Unknown message kind" in peer.receive(Error).error["message"]
        assert alive(peer)
    with Leader(broker.workers) as leader:
        leader.send(Ping())
        assert "Unknown message kind" in leader.receive(Error).error["message"]


def test_silent_clients_are_forgotten(run_dir):
    config = BrokerConfig(idle_client_timeout=0.5)
    with Serving(*PLACES["ipc"](run_dir), config) as serving, Peer(serving.clients) as peer:
        assert isinstance(peer.greet(), Welcome)
        for _ in range(600):
            if not serving.server.core.delivery.connections:
                break
            peer.socket.poll(100, zmq.POLLIN)
        assert not serving.server.core.delivery.connections


def test_a_broker_that_stays_awake_serves_keeps_time_and_ends(run_dir):
    """It looks at its sockets all the time; ticks come, streams flow, and `Serving` sees it end."""
    with Serving(*PLACES["ipc"](run_dir), awake=PATIENCE) as serving, FakeGroup(serving.workers) as group:
        assert [ask(serving.clients, n) for n in (7, 8)] == [text(7), text(8)]
        group.kill()
        with FakeGroup(serving.workers, name="other"):
            assert ask(serving.clients, 9) == text(9)
