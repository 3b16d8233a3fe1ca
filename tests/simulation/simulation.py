"""One history of a whole system: clients, one broker, groups, the links between them, and what befalls them.

Everything that happens follows from the seed. While it runs, each core asserts its invariants after each event, and
each client that its tokens are right, in order and without repeat. At the end it is checked that every request ended as
it should and that nobody remembers anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.broker.config import BrokerConfig
from headrace.client.events import Spec
from headrace.client.types import Timeouts
from headrace.errors import HeadraceError, WorkerCrashedError
from headrace.messages import pack_tokens
from headrace.tasks import EMBED, GENERATE
from tests.client.probe import Outcome, token_at
from tests.simulation.broker_node import BrokerNode
from tests.simulation.client_node import ClientNode
from tests.simulation.group_node import POISON, GroupNode, logprobs_at
from tests.simulation.world import World

__all__ = ["FAULTS", "Plan", "Simulation"]

_WORKLOAD = 15.0  # seconds during which requests come and faults happen
_PATIENCE = 400.0  # seconds after which everything must have ended
_MEMORY = 120  # seconds after which nobody may remember anything


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What kind of history.

    Attributes:
        faults: kinds of faults, drawn from `FAULTS`.
        count: how many of them, at most.
        cancels: callers close some of their streams.
        demanding: also deadlines, impatient clients, tiny queues.
        poison: how many requests take down the group that runs them.
        excuses: errors that a request without fault of its own may end with; mostly there are none.
        within: seconds that no request takes longer than, if there is room for all of them.
    """

    faults: tuple[str, ...] = ()
    count: int = 0
    cancels: bool = False
    demanding: bool = False
    poison: int = 0
    excuses: tuple[type[HeadraceError], ...] = ()
    within: float = _PATIENCE


class Simulation:
    """A history that can be run once."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.plan = plan
        self.world = world = World(seed)
        self.roomy = world.chance(0.5)  # rows and windows for all, so that nobody waits for anybody
        rows = 16 if self.roomy else world.random.choice([1, 2, 4])
        pace = 0.005 if self.roomy else world.random.choice([0.005, 0.02, 0.1])
        self.broker = BrokerNode(world, self._config())
        count = world.random.choice([1, 2, 3])
        self.groups = [
            GroupNode(world, self.broker, f"group {number}", rows=rows, pace=pace, moody=plan.demanding)
            for number in range(count)
        ]
        # Who must get an answer whatever happens has to be patient.
        timeouts = Timeouts() if plan.demanding else Timeouts(connect=100.0, first_token=300.0, between_tokens=200.0)
        self.clients = [ClientNode(world, self.broker, timeouts) for _ in range(world.random.choice([1, 2, 3]))]
        self.poisons: set[int] = set()
        self._tickets = 0
        self._ends_at = world.now + _WORKLOAD

    def run(self) -> None:
        """Let it happen, and check how it ended."""
        world = self.world
        for client in self.clients:
            world.after(world.between(0.0, 3.0), lambda client=client: self._submit(client))
        for _ in range(world.random.randint(1, self.plan.count) if self.plan.count else 0):
            kind = world.random.choice(self.plan.faults)
            world.after(world.between(0.0, _WORKLOAD), lambda kind=kind: self._strike(kind))
        world.run(self._ends_at)
        world.run(self._ends_at + _PATIENCE, stop=self._quiet)
        assert self._quiet(), "something still waits"
        self._check_outcomes()
        for _ in range(_MEMORY):
            world.run(world.now + 1.0)
            if self._forgotten():
                break
        self._check_nothing_is_left()

    # -------------------------------------------------------------------------------------------------- the workload

    def _config(self) -> BrokerConfig:
        choice = self.world.random.choice
        limits: dict[str, Any] = {
            "idempotency_window": 5.0,
            "idle_client_timeout": 20.0,
            "window_bytes": 1 << 20 if self.roomy else choice([400, 4000, 1 << 20]),
        }
        if self.plan.demanding:
            limits |= {
                "max_queued_requests": choice([8, 64, 1024]),
                "idempotency_window": choice([2.0, 20.0]),
                "max_finished": choice([4, 4096]),
                "client_share": choice([0.5, 1.0]),
                "progress_timeout": 10.0,
            }
        return BrokerConfig(**limits)

    def _submit(self, client: ClientNode) -> None:
        """A few requests of one client, and more of them later."""
        world = self.world
        if world.now >= self._ends_at:
            return
        if client.frozen:
            world.after(0.1, lambda: self._submit(client))
            return
        requests = {}
        for _ in range(world.random.choice([1, 1, 3, 8])):
            self._tickets += 1
            requests[self._tickets] = self._request(self._tickets)
            if self.plan.cancels and world.chance(0.15):
                ticket = self._tickets
                delay = world.between(0.0, 0.5 if self.roomy else 5.0)
                world.after(delay, lambda ticket=ticket: self._drop(client, ticket))
        client.start(requests)
        if world.now < self._ends_at - 3.0:
            world.after(world.between(0.5, 6.0), lambda: self._submit(client))

    def _drop(self, client: ClientNode, ticket: int) -> None:
        if client.frozen or (id := client.drop(ticket)) is None:
            return
        if not self.plan.faults:
            self.world.after(0.5, lambda: self._check_forgotten(id))

    def _check_forgotten(self, id: bytes) -> None:
        core = self.broker.core
        assert core is not None
        assert id not in core.jobs.live, "a cancelled request goes on"
        self.world.note("a cancel was heard")

    def _request(self, ticket: int) -> Spec:
        world = self.world
        choices = world.random.choice([1, 1, 1, 2, 3])
        longest = 400 if self.plan.cancels and self.roomy else 60  # or it ends before it is cancelled
        sampling: dict[str, Any] = {"seed": ticket, "max_tokens": world.random.randint(1, longest)}
        if choices > 1:
            sampling["n"] = choices
        if world.chance(0.3):
            sampling["stop_token_ids"] = [*range(20)]  # about one token in thirteen
        if world.chance(0.2):
            sampling["logprobs"] = world.random.randint(0, 2)
        if len(self.poisons) < self.plan.poison and world.chance(0.2):
            self.poisons.add(ticket)
            sampling = {"seed": ticket, "max_tokens": 50, "top_k": POISON}
            choices = 1
        pooling: dict[str, Any] = {}
        if ticket % 6 == 0 and ticket not in self.poisons:  # a vector, whose numbers come all at once
            pooling = {"dimensions": sampling["max_tokens"]}
            sampling, choices = {"seed": ticket}, 1
        prompt = pack_tokens(range(world.random.randint(1, 5)))
        timeout = world.between(0.5, 20.0) if self.plan.demanding and world.chance(0.15) else None
        return Spec(
            model="fake",
            prompt=prompt,
            sampling=sampling,
            choices=choices,
            fingerprint="f0",
            timeout=timeout,
            task=EMBED if pooling else GENERATE,
            pooling=pooling,
        )

    # ---------------------------------------------------------------------------------------------------- the faults

    def _strike(self, kind: str) -> None:
        self.world.note(f"fault: {kind}")
        FAULTS[kind](self)

    def any_client(self) -> ClientNode:
        """One of them."""
        return self.world.random.choice(self.clients)

    def any_group(self) -> GroupNode:
        """One of them."""
        return self.world.random.choice(self.groups)

    def freeze(self, node: Any, low: float, high: float) -> None:
        """Stop a process for a while."""
        node.frozen = True
        self.world.after(self.world.between(low, high), lambda: setattr(node, "frozen", False))

    def hang(self, group: GroupNode) -> None:
        """Let a group stop stepping for a while."""
        group.hung = True
        self.world.after(self.world.between(1.0, 20.0), lambda: setattr(group, "hung", False))

    def kill_broker(self) -> None:
        """It is gone, and comes back empty."""
        self.broker.kill()
        self.world.after(self.world.between(0.1, 3.0), self.broker.start)

    def stop_broker(self) -> None:
        """It ends with a word to everybody, and comes back empty."""
        if self.broker.core is not None and not self.broker.frozen:
            self.broker.stop()
            self.world.after(self.world.between(0.2, 3.0), self.broker.start)

    # ----------------------------------------------------------------------------------------------------- the checks

    def _quiet(self) -> bool:
        return self.world.now > self._ends_at and all(client.idle for client in self.clients)

    def _check_outcomes(self) -> None:
        for client in self.clients:
            for ticket, outcome in client.outcomes.items():
                assert outcome.over or outcome.dropped, f"request {ticket} did not end"
                took = outcome.ended_at - outcome.started_at
                assert took < self.plan.within or not self.roomy, f"request {ticket} took {took:.1f} s"
                if outcome.completed:
                    _check_answer(outcome)
                elif not outcome.dropped:
                    self._check_error(ticket, outcome.error)

    def _check_error(self, ticket: int, error: HeadraceError | None) -> None:
        assert error is not None
        if ticket in self.poisons and isinstance(error, WorkerCrashedError):
            self.world.note("poison is found out")
        else:
            assert isinstance(error, self.plan.excuses), f"request {ticket} ended with {error!r}"
            self.world.note(f"ended with {error.code}")

    def _forgotten(self) -> bool:
        if (core := self.broker.core) is None:
            return False
        report = core.report(self.world.now)
        running = sum(group.running for group in self.groups)
        return (
            report["requests"] == {"live": 0, "finished": 0}
            and report["queue"] == {"depth": 0, "tokens": 0, "parked": 0}
            and report["clients"] == 0
            and running == 0
        )

    def _check_nothing_is_left(self) -> None:
        core = self.broker.core
        assert core is not None
        assert self._forgotten(), core.report(self.world.now)
        for client in self.clients:
            assert list(client.probe.session.flights()) == []


def _check_answer(outcome: Outcome) -> None:
    """It is what the seed says, all of it."""
    assert outcome.spec is not None
    sampling = {"max_tokens": outcome.spec.pooling.get("dimensions"), **outcome.spec.sampling}
    for choice, tokens in enumerate(outcome.tokens):
        right: list[int] = []
        reason = ""
        while not reason:
            right.append(token_at(sampling["seed"], choice, len(right)))
            if right[-1] in sampling.get("stop_token_ids", ()):
                reason = "stop"
            elif len(right) == sampling["max_tokens"]:
                reason = "length"
        assert tokens == right
        assert outcome.reasons[choice] == reason
        wanted = sampling.get("logprobs")
        assert outcome.logprobs[choice] == ([] if wanted is None else [logprobs_at(t, wanted) for t in right])


def _partition(simulation: Simulation, node: ClientNode | GroupNode, low: float, high: float) -> None:
    if node.dealer is not None:
        node.dealer.partition(simulation.world.between(low, high))


FAULTS: dict[str, Callable[[Simulation], object]] = {
    "a client loses its link": lambda s: s.any_client().lose_link(),
    "a client is cut off": lambda s: _partition(s, s.any_client(), 0.1, 25.0),
    "a client's link is shaky": lambda s: s.any_client().shake_link(s.world.between(1.0, 10.0)),
    "a client freezes": lambda s: s.freeze(s.any_client(), 0.1, 25.0),
    "a client closes": lambda s: s.any_client().close(),
    "a client vanishes": lambda s: s.any_client().vanish(),
    "a group loses its link": lambda s: s.any_group().lose_link(),
    "a group is cut off": lambda s: _partition(s, s.any_group(), 0.1, 12.0),
    "a group crashes": lambda s: s.any_group().crash(),
    "a group freezes": lambda s: s.freeze(s.any_group(), 0.1, 12.0),
    "a group hangs": lambda s: s.hang(s.any_group()),
    "a group drains": lambda s: s.any_group().drain(),
    "the broker is killed": lambda s: s.kill_broker(),
    "the broker is stopped": lambda s: s.stop_broker(),
    "the broker freezes": lambda s: s.freeze(s.broker, 0.1, 12.0),
}
