"""A worker group in the simulation: the real pure leader, a shell that does what the real one does, and a fake engine.

The engine's tokens are a function of seed, choice and index, and its first look at a stream checks what it was told
that came before: a wrong resume is found where it happens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.broker.events import Face
from headrace.errors import OverloadedError
from headrace.messages import Assignment, Finish, Message, Refusal, StreamId, TokenRun, pack_tokens
from headrace.tasks import EMBED, GENERATE
from headrace.workers import plan
from headrace.workers.leader import Leader
from headrace.workers.leader_events import (
    Beat,
    Call,
    Connect,
    Disconnect,
    Drain,
    End,
    Event,
    LinkLost,
    Received,
    Refusals,
    Send,
    Stepped,
    Tick,
)
from tests.client.probe import token_at
from tests.simulation.network import Dealer, Router
from tests.simulation.world import World
from tests.support.fake_group import fake_card

__all__ = ["POISON", "GroupNode", "logprobs_at"]

POISON = 666  # a request with this top_k takes down the group that runs it
_HARMLESS_STEPS = 2  # that a poisonous one makes before


def logprobs_at(token: int, wanted: int) -> list[object]:
    """The log probabilities that go with a token."""
    return [-float(token), [[token, -float(token)]] * wanted]


class Crash(Exception):  # noqa: N818  it is no error here
    """What the engine computed took its process down."""


@dataclass
class _Results:
    """What a step gave."""

    runs: list[TokenRun] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


class _Row:
    """One stream that the engine works on."""

    def __init__(self, assignment: Assignment) -> None:
        sampling = assignment.sampling
        self.choice = assignment.choice
        self.seed = int(sampling["seed"])
        self.next_index = len(assignment.output) // 4
        self.max_tokens = int(sampling["max_tokens"])
        self.stops = set(sampling.get("stop_token_ids", ()))
        self.logprobs = sampling.get("logprobs")
        self.at_once = assignment.task == EMBED
        self.steps_to_live = _HARMLESS_STEPS if sampling.get("top_k") == POISON else -1
        output = memoryview(assignment.output).cast("I")
        assert list(output) == [token_at(self.seed, self.choice, index) for index in range(len(output))]

    def step(self, stream: StreamId, results: _Results) -> bool:
        """Make one token, or a whole vector; whether it was the last."""
        if self.at_once:
            items = [token_at(self.seed, self.choice, index) for index in range(self.next_index, self.max_tokens)]
            results.runs.append(TokenRun(*stream, self.next_index, pack_tokens(items), None))
            results.finishes.append(Finish(*stream, "length", self.max_tokens, 0))
            return True
        if self.steps_to_live == 0:
            raise Crash
        self.steps_to_live -= 1
        token = token_at(self.seed, self.choice, self.next_index)
        logprobs = None if self.logprobs is None else [logprobs_at(token, self.logprobs)]
        results.runs.append(TokenRun(*stream, self.next_index, pack_tokens([token]), logprobs))
        self.next_index += 1
        reason = "stop" if token in self.stops else "length" if self.next_index >= self.max_tokens else None
        if reason is not None:
            results.finishes.append(Finish(*stream, reason, self.next_index, 0))
        return reason is not None


class _Engine:
    """Has the methods that a plan is carried out on."""

    def __init__(self, world: World, rows: int, *, moody: bool) -> None:
        self.rows: dict[StreamId, _Row] = {}
        self.steps = 0
        self._world = world
        self._max_rows = rows
        self._moody = moody  # refuses now and then

    @property
    def has_work(self) -> bool:
        return bool(self.rows)

    def add(self, assignment: Assignment, now: float) -> None:
        stream = StreamId(assignment.request, assignment.choice, assignment.attempt)
        assert stream not in self.rows
        if self._moody and self._world.chance(0.02):
            self._world.note("refused")
            raise OverloadedError("no blocks")
        assert len(self.rows) < self._max_rows, "more streams than rows"
        self.rows[stream] = _Row(assignment)

    def revoke(self, stream: StreamId) -> None:
        self.rows.pop(stream, None)

    def revoke_all(self) -> None:
        self.rows.clear()

    def step(self, now: float) -> _Results:
        self.steps += 1
        results = _Results()
        self.rows = {stream: row for stream, row in self.rows.items() if not row.step(stream, results)}
        return results


class GroupNode:
    """A group that can crash, freeze, hang and drain; after its end it is started again."""

    def __init__(self, world: World, router: Router, name: str, *, rows: int, pace: float, moody: bool) -> None:
        self.name = name
        self.frozen = False  # the whole process stands still
        self.hung = False  # only its loop does, in a step; heartbeats go on
        self.dealer: Dealer | None = None
        self._world = world
        self._router = router
        self._max_rows = rows
        self._moody = moody
        self._pace = pace  # seconds per step
        self._life = 0
        self._start()

    @property
    def running(self) -> int:
        """Streams that it works on."""
        return len(self._engine.rows)

    # ------------------------------------------------------------------------------------------------ life and death

    def crash(self) -> None:
        """The process dies."""
        if self._alive:
            self._world.note(f"{self.name} crashes")
            self._end(last_words=False)

    def drain(self) -> None:
        """The process was told to end."""
        if self._alive and not self.frozen and not self.hung:
            self._world.note(f"{self.name} drains")
            self._feed(Drain(self._world.between(0.1, 2.0)))

    def lose_link(self) -> None:
        """The connection to the broker breaks."""
        if self.dealer is not None:
            self.dealer.lose()

    def _start(self) -> None:
        self._life += 1
        self._alive = True
        self._computing = False
        self._waking_at: float | None = None
        self._calls: list[plan.Call] = []
        self._engine = _Engine(self._world, self._max_rows, moody=self._moody)
        self._leader = Leader(
            group=self.name,
            card=fake_card(tasks=(GENERATE, EMBED), embedding_size=400),
            max_num_seqs=self._max_rows,
            kv_tokens=4096,
            blobs={},
            life=f"{self.name} {self._life}",
        )
        self._feed(Tick())

    def _end(self, *, last_words: bool) -> None:
        self._alive = self.frozen = self.hung = False
        self._engine.revoke_all()
        if self.dealer is not None:
            self.dealer.close(last_words=last_words)
            self.dealer = None
        self._world.after(self._world.between(0.2, 3.0), self._start)

    # ----------------------------------------------------------------------------------------------------- its shell

    def _held(self) -> bool:
        return self.frozen or self.hung

    def _receive(self, message: Message) -> None:
        self._feed(Received(message))
        self._feed(Tick())

    def _link_lost(self) -> None:
        """The socket's monitor says so, and the loop hears of it when it can."""
        life, dealer = self._life, self.dealer

        def tell() -> None:
            if self._held():
                self._world.after(0.05, tell)
            elif life == self._life and self._alive and dealer is self.dealer:
                self._feed(LinkLost())

        self._world.after(self._world.between(0.0, 0.1), tell)

    def _feed(self, event: Event) -> None:
        if not self._alive:
            return
        actions = self._leader.handle(event, self._world.now)
        self._leader.validate()
        for action in actions:
            match action:
                case Send():
                    if self.dealer is not None:
                        self.dealer.send(action.message)
                case Call():
                    self._calls.append(action.call)
                case Connect():
                    assert self.dealer is None
                    self.dealer = Dealer(
                        self._world, self._router, Face.WORKERS, self._receive, self._held, self._link_lost
                    )
                case Disconnect():
                    if self.dealer is not None:
                        self.dealer.close()
                        self.dealer = None
                case End():
                    assert action.error is None, action.error
                    self._end(last_words=True)
                    return
        self._plan_wake()
        self._plan_step()

    def _plan_wake(self) -> None:
        wake_at, life = max(self._leader.wake_at(), self._world.now + 0.001), self._life
        if self._waking_at is None or wake_at < self._waking_at:
            self._waking_at = wake_at
            self._world.after(wake_at - self._world.now, lambda: self._wake(life))

    def _wake(self, life: int) -> None:
        if life != self._life or not self._alive:
            return
        if self.frozen:
            self._world.after(0.05, lambda: self._wake(life))
            return
        self._waking_at = None
        self._feed(Beat() if self.hung else Tick({"running": self.running}))

    def _plan_step(self) -> None:
        if not self._computing and (self._calls or self._engine.has_work):
            self._computing = True
            life = self._life
            self._world.after(self._pace, lambda: self._step(life))

    def _step(self, life: int) -> None:
        if life != self._life or not self._alive:
            return
        if self._held():
            self._world.after(0.05, lambda: self._step(life))
            return
        self._computing = False
        calls, self._calls = self._calls, []
        try:
            refusals, results = plan.carry_out(self._engine, calls, self._world.now)
        except Crash:
            self._world.note("poison takes effect")
            self.crash()
            return
        if refusals:
            self._feed(Refusals(refusals))
        if results is not None:
            self._feed(Stepped(results, self._engine.steps))
        self._plan_step()
