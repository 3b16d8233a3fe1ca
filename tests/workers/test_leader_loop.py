"""The leader's loop on real sockets, against a broker that the test plays by hand."""

import threading
from collections import Counter
from contextlib import contextmanager
from multiprocessing import Pipe

import psutil
import pytest
import zmq

from headrace.codec import decode, encode
from headrace.errors import InternalError, UnsupportedVersionError, from_wire
from headrace.messages import (
    LEADER_TO_BROKER,
    Assign,
    Assignment,
    Blob,
    Done,
    Drain,
    Drained,
    Error,
    GetBlob,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Refused,
    Reset,
    Revoke,
    StreamId,
    Tokens,
    pack_tokens,
    unpack_tokens,
)
from headrace.workers.leader_loop import LeaderLoop
from headrace.workers.plan import PlanWriter, follow
from tests.support.children import LIMIT, wait_until
from tests.support.fake_engine import Behaviour, FakeEngine
from tests.support.worker_pool import expected

A = b"a" * 16


class HandBroker:
    """A ROUTER for one leader; says only what the test says."""

    def __init__(self, endpoint, receive_limit=1000):
        self._context = zmq.Context()
        self._receive_limit = receive_limit
        self.endpoint = endpoint
        self.peer = b""
        self.peers = set()
        self.hello = None
        self.bind()

    def bind(self):
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, self._receive_limit)
        self.socket.bind(self.endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self):
        self.socket.close(0)
        self._context.term()

    def take(self, *kinds):
        """The next message of one of the kinds, of the newest connection; others are dropped."""
        while True:
            assert self.socket.poll(LIMIT * 1000), f"no {kinds}"
            peer, *frames = self.socket.recv_multipart()
            message = decode(frames, LEADER_TO_BROKER)
            assert peer in self.peers or isinstance(message, GroupHello), "a connection begins with a hello"
            if isinstance(message, GroupHello):
                self.peer = peer
                self.peers.add(peer)
            if isinstance(message, kinds) and peer == self.peer:
                return message

    def say(self, message):
        self.socket.send_multipart([self.peer, *encode(message)])

    def welcome(self, heartbeat_ms=100):
        self.hello = self.take(GroupHello)
        self.say(GroupWelcome(broker="hand", heartbeat_ms=heartbeat_ms))
        return self

    def part(self):
        """Hear a leader's last words, as the broker does."""
        self.take(Drained)
        self.take(Heartbeat)
        self.say(Reset(reason="The broker does not know this group."))

    def assign(self, request=A, attempt=1, output=(), prompt=(1,), **sampling):
        sampling = {"seed": 1, "max_tokens": 5} | sampling
        stream = Assignment(
            request=request,
            choice=0,
            attempt=attempt,
            prompt=pack_tokens(prompt),
            output=pack_tokens(output),
            sampling=sampling,
        )
        self.say(Assign(assignments=(stream,)))


@pytest.fixture(params=["ipc", "tcp"])
def broker(request, run_dir):
    broker = HandBroker(f"ipc://{run_dir}/workers" if request.param == "ipc" else "tcp://127.0.0.1:*")
    yield broker
    broker.close()


class LoopThread:
    """A leader's loop in a thread, and how it ended."""

    def __init__(self, endpoint, engine=None, **options):
        self.engine = engine or FakeEngine()
        self.loop = LeaderLoop(self.engine, endpoint, "g", **options)
        self.error = None
        self.thread = threading.Thread(target=self._run, name="leader", daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.loop.run()
        except Exception as error:
            self.error = error

    def join(self):
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()
        return self.error


@contextmanager
def leading(broker, engine=None, **options):
    """A leader that was welcomed; drained at the end, if it has not ended."""
    leader = LoopThread(broker.endpoint, engine, **options)
    broker.welcome()
    yield leader
    if leader.thread.is_alive():
        broker.say(Drain(grace_ms=0))
        broker.part()
    assert leader.join() is None


def tokens_of(message, start=0):
    runs = list(message.runs)
    assert [run.first for run in runs] == list(range(start, start + len(runs)))
    return [token for run in runs for token in unpack_tokens(run.tokens)]


def test_a_stream_from_the_hello_to_the_farewell(broker):
    with leading(broker) as leader:
        assert broker.hello.group == "g"
        assert broker.hello.card == leader.engine.card
        [digest] = broker.hello.card.blobs.values()
        broker.say(GetBlob(hash=digest, offset=100))
        assert broker.take(Blob).data == next(iter(leader.engine.blobs.values()))[100:]
        broker.assign(max_tokens=3)
        got = [broker.take(Tokens) for _ in range(3)]
        assert [t for index, message in enumerate(got) for t in tokens_of(message, index)] == expected(1, 3)
        assert [message.step for message in got] == [1, 2, 3]
        assert broker.take(Done).finishes[0].total == 3
        broker.say(Drain(grace_ms=60_000))
        broker.part()
        assert leader.join() is None


def test_a_resumed_stream_continues(broker):
    with leading(broker):
        broker.assign(attempt=4, output=expected(1, 3), max_tokens=5)
        assert tokens_of(broker.take(Tokens), 3) == expected(1, 5)[3:4]
        assert broker.take(Done).finishes == ((A, 0, 4, "length", 5, 0),)


def test_idle_it_sends_heartbeats_and_nothing_else(broker):
    with leading(broker):
        beats = [broker.take(Heartbeat, Tokens, Done) for _ in range(5)]
        assert {(beat.step, beat.busy) for beat in beats} == {(0, False)}
        assert beats[-1].load == {"running": 0, "waiting": 0}


def test_heartbeats_go_on_during_a_step_that_takes_long(broker):
    release = threading.Event()

    class Slow(FakeEngine):
        def step(self, now):
            assert release.wait(LIMIT)
            return super().step(now)

    with leading(broker, Slow()):
        broker.assign()
        while not broker.take(Heartbeat).busy:
            pass
        for _ in range(5):
            beat = broker.take(Heartbeat, Tokens)
            assert (type(beat), beat.step, beat.busy) == (Heartbeat, 0, True)
        release.set()
        broker.take(Done)
        while broker.take(Heartbeat).step < 5:
            pass


def test_what_the_engine_refuses_is_refused(broker):
    with leading(broker) as leader:
        broker.assign(prompt=[99_999])
        [refusal] = broker.take(Refused).refusals
        assert from_wire(refusal.error).param == "prompt"
        assert not leader.engine.has_work


def test_a_revoke_frees_the_row(broker):
    with leading(broker, FakeEngine(behaviour=Behaviour(step_delay=0.001))) as leader:
        broker.assign(max_tokens=100_000)
        broker.take(Tokens)
        broker.say(Revoke(streams=(StreamId(A, 0, 1),)))
        wait_until(lambda: not leader.engine.has_work, "the row is free")
        while broker.take(Heartbeat).busy:
            pass


def test_after_a_reset_a_new_connection_names_what_ran(broker):
    with leading(broker, FakeEngine(behaviour=Behaviour(step_delay=0.001))) as leader:
        broker.assign(max_tokens=100_000)
        broker.take(Tokens)
        old = broker.peer
        broker.say(Reset(reason="silent"))
        broker.welcome()
        assert broker.peer != old
        assert broker.hello.running == ((A, 0, 1),)
        wait_until(lambda: not leader.engine.has_work, "the row is free")
        broker.assign(attempt=2, max_tokens=2)
        assert tokens_of(broker.take(Tokens)) == expected(1, 1)


def test_a_broker_that_vanished_is_greeted_anew_when_there_is_one_again(broker):
    """Nobody tells the leader: the library below would mend the connection in silence, under another identity."""
    with leading(broker, FakeEngine(behaviour=Behaviour(step_delay=0.001))) as leader:
        broker.assign(max_tokens=100_000)
        broker.take(Tokens)
        broker.socket.close(0)
        wait_until(lambda: not leader.engine.has_work, "the row is free")
        broker.bind()
        broker.welcome()
        assert broker.hello.running == ((A, 0, 1),)
        broker.assign(attempt=2, max_tokens=2)
        assert tokens_of(broker.take(Tokens)) == expected(1, 1)


def test_what_waited_for_one_connection_does_not_come_up_on_the_next(run_dir):
    broker = HandBroker(f"ipc://{run_dir}/workers")
    with leading(broker) as leader:
        broker.assign(max_tokens=100_000)
        wait_until(lambda: not leader.loop._core.may_step, "the broker's pipe is full")
        broker.say(Reset())
        wait_until(lambda: leader.loop._core.may_step, "it gives the connection up before the pipe has room")
        broker.welcome()
        broker.assign(attempt=2, max_tokens=1)
        assert [run.attempt for run in broker.take(Tokens).runs] == [2]
    broker.close()


def test_nonsense_from_the_broker_costs_nothing(broker, caplog):
    with leading(broker):
        for frames in ([b""], [b"Assign", b"\xc1"], [b"Assign", b"\x80"], [b"Hello", b"\x80"], [b"a"] * 9):
            broker.socket.send_multipart([broker.peer, *frames])
        broker.assign(max_tokens=1)
        assert tokens_of(broker.take(Tokens)) == expected(1, 1)
    assert caplog.text.count("a message of the broker was dropped") == 5


def test_a_broker_that_refuses_the_group_ends_it(broker):
    leader = LoopThread(broker.endpoint)
    broker.take(GroupHello)
    broker.say(Error(error=UnsupportedVersionError("version 7 of the protocol").to_wire()))
    assert isinstance(leader.join(), UnsupportedVersionError)


def test_an_engine_that_fails_ends_the_leader_and_the_broker_hears_nothing_false(broker):
    class Failing(FakeEngine):
        def step(self, now):
            if self.steps == 2:
                raise ZeroDivisionError("a step that fails")
            return super().step(now)

    leader = LoopThread(broker.endpoint, Failing())
    broker.welcome()
    broker.assign(max_tokens=50)
    assert isinstance(leader.join(), ZeroDivisionError)
    kinds = Counter()
    while broker.socket.poll(200):
        _, *frames = broker.socket.recv_multipart()
        kinds[type(decode(frames, LEADER_TO_BROKER))] += 1
    assert kinds[Tokens] <= 2
    assert not kinds.keys() & {Done, Drained, Refused}


def test_a_broker_that_does_not_read_stops_the_steps_and_loses_nothing(run_dir):
    """What waits for it is bounded; when it reads on, every token is there."""
    broker = HandBroker(f"ipc://{run_dir}/workers", receive_limit=1)
    count = 200_000
    with leading(broker) as leader:
        broker.assign(max_tokens=count)
        seen = []

        def stands_still():
            seen.append(leader.engine.steps)
            return len(seen) > 100 and len(set(seen[-100:])) == 1

        wait_until(stands_still, "the steps stop")
        assert 1000 < seen[-1] < count
        position = 0
        while position < seen[-1] + 100:  # and on it goes
            position += len(tokens_of(broker.take(Tokens), position))
        broker.say(Revoke(streams=(StreamId(A, 0, 1),)))
        while not isinstance(message := broker.take(Tokens, Heartbeat), Heartbeat) or message.busy:
            if isinstance(message, Tokens):
                position += len(tokens_of(message, position))
        assert position == leader.engine.steps
    broker.close()


def test_the_last_words_come_after_all_that_waited(run_dir):
    broker = HandBroker(f"ipc://{run_dir}/workers")
    with leading(broker) as leader:
        broker.assign(max_tokens=100_000)
        wait_until(lambda: not leader.loop._core.may_step, "the broker's pipe is full")
        broker.say(Drain(grace_ms=0))
        position = 0
        while not isinstance(message := broker.take(Tokens, Drained), Drained):
            position += len(tokens_of(message, position))
        broker.take(Heartbeat)
        broker.say(Reset())
        assert leader.join() is None
        assert position == leader.engine.steps
    broker.close()


def test_followers_do_what_the_leader_does_and_end_with_it(broker):
    pipes = [Pipe(duplex=False) for _ in range(2)]
    engines = [FakeEngine(), FakeEngine()]
    threads = [threading.Thread(target=follow, args=(e, r)) for e, (r, _) in zip(engines, pipes, strict=True)]
    for thread in threads:
        thread.start()
    with leading(broker, writer=PlanWriter([w for _, w in pipes], check_every=3)) as leader:
        broker.assign(max_tokens=20)
        broker.take(Done)
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert [engine.steps for engine in engines] == [leader.engine.steps] * 2 == [20, 20]
    for pipe in pipes:
        for end in pipe:
            end.close()


def test_a_follower_that_is_gone_ends_the_leader(broker):
    reader, writer = Pipe(duplex=False)
    leader = LoopThread(broker.endpoint, writer=PlanWriter([writer]))
    broker.welcome()
    reader.close()
    broker.assign()
    assert isinstance(leader.join(), OSError)
    writer.close()


def test_a_loop_leaves_nothing_open(run_dir):
    before = psutil.Process().num_fds(), threading.active_count()
    broker = HandBroker(f"ipc://{run_dir}/workers")
    with leading(broker):
        broker.say(Reset())  # so that there were two sockets
        broker.welcome()
    broker.close()
    assert (psutil.Process().num_fds(), threading.active_count()) == before


def test_without_a_broker_it_ends_when_asked(run_dir):
    leader = LoopThread(f"ipc://{run_dir}/nobody")
    leader.loop.on_sigterm(15, None)
    assert leader.join() is None


def test_internal_errors_keep_their_type():
    """The follower's error is one of our tree, so it crosses to the launcher as it is."""
    reader, writer = Pipe(duplex=False)
    writer.close()
    with pytest.raises(InternalError, match="leader of the group is gone"):
        follow(FakeEngine(), reader)
    reader.close()


def watch_sleeps(leader) -> list[int]:
    """Milliseconds that a leader means to sleep from now on, each time."""
    poll, sleeps = leader.loop._poller.poll, []

    def watched(timeout):
        sleeps.append(timeout)
        return poll(timeout)

    leader.loop._poller.poll = watched
    return sleeps


def test_who_stays_awake_does_not_sleep_between_two_requests(broker):
    with leading(broker, awake=LIMIT) as leader:
        broker.assign(max_tokens=2)
        broker.take(Done)
        sleeps = watch_sleeps(leader)
        broker.take(Heartbeat)  # awake, but not deaf to the clock
        broker.assign(request=b"b" * 16, max_tokens=2)
        broker.take(Done)
        assert set(sleeps) == {0}


def test_without_being_told_to_it_sleeps_at_once(broker):
    with leading(broker) as leader:
        broker.assign(max_tokens=2)
        broker.take(Done)
        sleeps = watch_sleeps(leader)
        broker.take(Heartbeat)
        broker.take(Heartbeat)
        assert 0 < len(sleeps) < 20
        assert any(sleeps)
