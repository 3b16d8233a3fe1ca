"""Leaders' cores against the broker's core, on a virtual clock, under random faults: no token is lost or wrong.

Everything between is simulated: connections break, processes die, stop and go on, brokers are restarted, groups drain,
pipes fill. Every message passes the codec, every core validates itself, and every client checks every token.
"""

from collections import deque

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headrace.broker.events import Face, PeerLost
from headrace.errors import WorkerCrashedError
from headrace.messages import Finish, StreamId, TokenRun, pack_tokens, unpack_tokens
from headrace.workers.leader import Leader, Link
from headrace.workers.leader_events import (
    Blocked,
    Call,
    Connect,
    Disconnect,
    Drain,
    End,
    Flowing,
    LinkLost,
    Received,
    Refusals,
    Send,
    Stepped,
    Tick,
)
from headrace.workers.plan import carry_out
from tests.broker.world import PureClient, World, card, emit, request
from tests.support.fake_engine import FakeEngine, StepResult

EOS = 7
_PROGRESS = 10.0  # seconds without a step after which a group with work is hung


class SimEngine(FakeEngine):
    """Says what the clients of the simulation expect, and ends a text where they do."""

    def __init__(self):
        super().__init__()
        self.card, self.blobs = card(), {}

    def step(self, now):
        self.steps += 1
        result = StepResult()
        for key, (assignment, index) in list(self._rows.items()):
            sampling = assignment.sampling
            token = emit(int(sampling["seed"]), assignment.choice, index)
            stream = StreamId(*key, assignment.attempt)
            result.runs.append(TokenRun(*stream, index, pack_tokens([token]), None))
            self._rows[key] = (assignment, index + 1)
            stop = token == EOS and not sampling.get("ignore_eos")
            if stop or index + 1 >= int(sampling["max_tokens"]):
                result.finishes.append(Finish(*stream, "stop" if stop else "length", index + 1, 0))
                del self._rows[key]
        return result

    def add(self, assignment, now):
        held = list(unpack_tokens(assignment.output))
        seed = int(assignment.sampling["seed"])
        assert held == [emit(seed, assignment.choice, index) for index in range(len(held))]
        super().add(assignment, now)


class SimGroup:
    """A leader's core and its engine, as the loop drives them; lives in a World of the broker's tests."""

    def __init__(self, world, name):
        self.world, self.name = world, name
        self.inbox = deque()
        self.alive = self.frozen = False
        self.peer = b""
        world.groups.append(self)

    def start(self):
        """A fresh process."""
        self.engine = SimEngine()
        self.core = Leader(
            group=self.name,
            card=self.engine.card,
            max_num_seqs=self.engine.max_num_seqs,
            kv_tokens=self.engine.kv_tokens,
            blobs={},
        )
        self.calls, self.outbox = [], []
        self.alive, self.frozen = True, False
        self.beat()

    def die(self):
        """SIGKILL."""
        self.alive = False
        self.drop_link()

    def drop_link(self):
        self.peer = b""
        self.inbox.clear()
        self.outbox = []

    def lose_link(self):
        """The connection breaks; the broker may learn of it, if it tries to send."""
        if self.alive and self.peer:
            peer, self.peer = self.peer, b""
            self.inbox.clear()
            self.handle(LinkLost())
            return peer
        return b""

    def block(self, blocked):
        """The broker's pipe is full, or has room again."""
        if not self.alive or self.core.link is not Link.READY or blocked != self.core.may_step:
            return
        self.handle(Blocked() if blocked else Flowing())
        if not blocked:
            outbox, self.outbox = self.outbox, []
            for message in outbox:
                self.send(message)

    def handle(self, event):
        now = self.world.now
        for action in self.core.handle(event, now):
            match action:
                case Connect():
                    self.drop_link()
                    self.peer = self.world.new_peer(self.name)
                case Disconnect():
                    self.drop_link()
                case Send():
                    self.send(action.message)
                case Call():
                    self.calls.append(action.call)
                case End():
                    assert action.error is None
                    self.die()
        self.core.validate()

    def send(self, message):
        if not self.core.may_step and self.core.link is not Link.LEAVING:
            self.outbox.append(message)
        elif self.peer:
            self.world.receive(Face.WORKERS, self.peer, message)

    # ------------------------------------------------------------------------------------- what the world calls

    def read(self):
        while self.inbox and self.alive and not self.frozen:
            self.handle(Received(self.inbox.popleft()))

    def beat(self):
        if self.alive and not self.frozen:
            self.handle(Tick(self.engine.load_gauges()))

    def step(self):
        if not self.alive or self.frozen or not self.core.may_step or not (self.calls or self.engine.has_work):
            return
        calls, self.calls = self.calls, []
        refusals, results = carry_out(self.engine, calls, self.world.now)
        if refusals:
            self.handle(Refusals(refusals))
        if results is not None:
            self.handle(Stepped(results, self.engine.steps))
        if self.alive and not self.calls and self.core.link is Link.READY:
            held = {(request, choice): attempt for request, choice, attempt in self.engine.running()}
            assert held == self.core._streams, "the core and its engine hold different streams"


FAULTS = [
    *("step", "step", "step", "tick", "wait"),
    *("kill", "freeze", "thaw", "cut", "cut silently", "block", "flow", "drain", "start"),
    *("restart broker", "reconnect client", "cancel"),
]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@example([("submit", 0), ("submit", 0), ("wait", 1), ("wait", 5), ("wait", 5)])  # nobody steps: both groups are hung
@given(st.lists(st.tuples(st.sampled_from(["submit", *FAULTS]), st.integers(0, 5)), min_size=5, max_size=80))
def test_every_stream_ends_with_its_whole_text(moves):
    world = World(seed=1, max_redispatch=10_000, progress_timeout=_PROGRESS, unavailable_after=1e6)
    groups = [SimGroup(world, f"g{n}") for n in range(2)]
    for group in groups:
        group.start()
    clients = [PureClient(world, f"c{n}").hello() for n in range(2)]
    world.settle()
    records, number, harmed = [], 0, False
    still = 0.0  # seconds in which nobody made a step

    for move, n in [("submit", 0), *moves]:
        group, client = groups[n % 2], clients[n % 2]
        harmed |= move in ("kill", "freeze", "cut", "cut silently", "block", "restart broker")
        match move:
            case "submit":
                number += 1
                [record] = client.submit(request(number, max_tokens=5 + 7 * n, ignore_eos=n % 2 == 0, n=1 + n % 3))
                records.append((client, record))
            case "step":
                world.step(n)
                still = 0.0 if n else still
            case "tick":
                world.tick(0.1)
                still += 0.1
            case "wait":
                for _ in range(n * 4):
                    world.tick(0.5)
                still += 2.0 * n
            case "kill":
                group.die()
            case "freeze":
                group.frozen = True
            case "thaw":
                group.frozen = False
                group.step()  # the one that was under way
            case "cut":
                if not group.frozen and (peer := group.lose_link()):
                    world.feed(PeerLost(Face.WORKERS, peer))
            case "cut silently":
                if not group.frozen:
                    group.lose_link()
            case "block":
                group.block(True)
            case "flow":
                group.block(False)
            case "drain":
                if group.alive and not group.frozen:
                    group.handle(Drain(float(n)))
            case "start":
                if not group.alive:
                    group.start()
            case "restart broker":
                world.restart_broker()
                if n % 2:  # a connection that breaks is seen at once, one that the kernel keeps only by what is said
                    for each in groups:
                        if not each.frozen:
                            each.lose_link()
            case "reconnect client":
                client.reconnect()
            case "cancel" if records:
                client, record = records[n % len(records)]
                client.cancel(record)
        world.settle()
        harmed |= still > _PROGRESS - 1.0  # sums of tenths are not exact, and beats are not at once

    for group in groups:
        group.frozen = False
        group.block(False)
        if not group.alive:
            group.start()
    world.finish([record for _, record in records], steps=3000)
    for _, record in records:
        record.check()
        if record.error is not None and not record.cancelled:
            assert harmed
            assert isinstance(record.error, WorkerCrashedError), record.error
    for _ in range(50):
        world.step()
        world.tick(0.5)
    assert all(not group.engine.has_work for group in groups if group.alive), "rows that nobody needs"
