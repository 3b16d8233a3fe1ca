"""The contract under random schedules: clients, groups and connections fail in every order that can be thought of.

What must hold is checked all the time: the broker's own `validate`, and every token that a client reads. At the end
everything that was broken is mended; then every request must end, with its whole text or with an error that fits what
was done to it, and the broker must be as empty as it began.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from headrace.broker.events import Face, Malformed
from headrace.errors import (
    DeadlineExceededError,
    ModelChangedError,
    OverloadedError,
    RequestCancelledError,
    SlowConsumerError,
    UnavailableError,
    UnknownRequestError,
    WorkerCrashedError,
)
from headrace.messages import Done, Finish, Submit, TokenRun, Tokens, pack_tokens
from tests.broker.world import PureClient, PureGroup, Record, World, card, emit, request

POISON = 99  # a prompt that begins with it takes its group down at a token that the next number names

pick = st.integers(0, 2)


class BrokerMachine(RuleBasedStateMachine):
    """Three clients, three groups, one broker."""

    records = Bundle("records")

    @initialize(seed=st.integers(0, 1000), ready=st.booleans())
    def begin(self, seed: int, ready: bool) -> None:
        self.world = World(
            seed=seed,
            max_queued_requests=24,
            max_queued_tokens=120,
            window_bytes=240,
            stall_timeout=20.0,
            progress_timeout=10.0,
            idempotency_window=60.0,
            max_finished=16,
            max_finished_bytes=1 << 14,
            quarantine=30.0,
        )
        self.next_id = 1
        self.all: list[tuple[PureClient, Record]] = []
        self.versions = 0
        self.groups = [
            PureGroup(self.world, f"g{n}", rows=n + 2, kills=lambda a, i: _poisoned(a.prompt) == i) for n in range(3)
        ]
        if ready:
            for group in self.groups:
                group.start()
        self.clients = [PureClient(self.world, f"c{n}").hello() for n in range(3)]
        self.world.settle()

    # -------------------------------------------------------------------------------------------------- requests

    @rule(
        target=records,
        who=pick,
        count=st.integers(1, 6),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.integers(1, 40),
        prompt=st.lists(st.integers(0, 50), min_size=1, max_size=6),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, None, None, 0, 2]),
        seeded=st.booleans(),
        budget_ms=st.sampled_from([None, None, None, 50, 3000]),
        poison=st.sampled_from([None] * 8 + [0, 3, 12]),
    )
    def submit(self, who, count, n, max_tokens, prompt, ignore_eos, logprobs, seeded, budget_ms, poison):
        made = []
        for _ in range(count):
            number, self.next_id = self.next_id, self.next_id + 1
            made.append(
                request(
                    number,
                    prompt=prompt if poison is None else [POISON, poison, number % 251],
                    n=n,
                    max_tokens=max_tokens,
                    ignore_eos=ignore_eos,
                    logprobs=logprobs,
                    seed=number if seeded else None,
                    budget_ms=budget_ms,
                )
            )
        records = self.clients[who].submit(*made)
        self.all += [(self.clients[who], record) for record in records]
        return multiple(*((who, record) for record in records))

    @rule(entry=records)
    def submit_again(self, entry):
        """The answer to the first Submit may have been lost."""
        who, record = entry
        if not record.ended and record.gaps == 0:
            self.clients[who].submit(self.clients[who].again(record))

    @rule(entry=records)
    def submit_something_else(self, entry):
        who, record = entry
        first = record.request
        if self.world.broker.jobs.get(first.id) is None or self.clients[who].peer in self.world.blocked:
            return
        client = self.clients[who]
        self.world.tick()  # what waited for a blocked connection goes out
        if client.peer not in self.world.broker.delivery.connections or self.world.broker.jobs.get(first.id) is None:
            return
        before = client.conflicts
        other = request(int.from_bytes(first.id), prompt=[1, 2, 3, 4, 5, 6, 7, 8], max_tokens=3)
        client.send(Submit(requests=(other,)))
        client.read()
        assert client.conflicts == before + 1

    @rule(entry=consumes(records))
    def cancel(self, entry):
        who, record = entry
        if not record.ended:
            self.clients[who].cancel(record)

    # ---------------------------------------------------------------------------------------------------- groups

    @rule(times=st.integers(1, 20))
    def step(self, times):
        self.world.step(times)

    @rule(which=pick, times=st.integers(1, 5))
    def step_one(self, which, times):
        for _ in range(times):
            self.groups[which].step()
            self.world.settle()

    @rule(which=pick)
    def step_without_a_turn(self, which):
        self.groups[which].step()

    @rule(which=pick)
    def kill(self, which):
        if self.groups[which].alive:
            self.groups[which].die()

    @rule(which=pick)
    def start(self, which):
        if not self.groups[which].alive:
            self.groups[which].start()
            self.world.settle()

    @rule(which=pick)
    def new_weights(self, which):
        """The group comes back with another model under the same name."""
        group = self.groups[which]
        if group.alive and not group.frozen:
            self.versions += 1
            group.die()
            group.card = card(fingerprint=f"f{self.versions}")
            group.start()
            self.world.settle()

    @rule(which=pick)
    def freeze(self, which):
        self.groups[which].frozen = True

    @rule(which=pick)
    def thaw(self, which):
        group = self.groups[which]
        if group.alive and group.frozen:
            group.thaw()
            self.world.settle()

    @rule(which=pick, hung=st.booleans())
    def hang(self, which, hung):
        self.groups[which].hung = hung

    @rule(which=pick)
    def drain(self, which):
        group = self.groups[which]
        if group.alive and not group.frozen:
            group.beat(draining=1)
            self.world.step()
            group.drain()
            self.world.settle()
            group.hello()

    @rule(which=pick, skip=st.integers(-3, 3), count=st.integers(0, 4))
    def stutter(self, which, skip, count):
        """A leader repeats itself, leaves something out, or says too much at once."""
        group = self.groups[which]
        if not group.alive or group.frozen or not group.rows:
            return
        stream, (assignment, index) = next(iter(group.rows.items()))
        first = max(0, index + skip)
        seed = int(assignment.sampling["seed"])
        tokens = pack_tokens(emit(seed, stream.choice, first + k) for k in range(count))
        if first + count > index and (skip <= 0 or count == 0):
            return  # it would be believed, and the fake group lose count of its own row
        group.send(Tokens(runs=(TokenRun(*stream, first, tokens, None),), step=group.steps))
        self.world.settle()

    @rule(which=pick)
    def end_too_early(self, which):
        group = self.groups[which]
        if group.alive and not group.frozen and group.rows:
            stream, (_, index) = next(iter(group.rows.items()))
            group.send(Done(finishes=(Finish(*stream, "stop", index + 1, 0),)))
            self.world.settle()

    @rule(which=pick)
    def garble(self, which):
        group = self.groups[which]
        if group.alive:
            self.world.feed(Malformed(Face.WORKERS, group.peer, "nonsense"))
            self.world.settle()

    # ------------------------------------------------------------------------------------------- connections, time

    @rule(who=pick, acks=st.booleans())
    def stop_acknowledging(self, who, acks):
        client = self.clients[who]
        client.acks = acks
        if acks:
            client.confirm(*client.records.values())
            self.world.settle()

    @rule(who=pick)
    def reconnect(self, who):
        self.clients[who].reconnect()
        self.world.settle()

    @rule(who=pick, silent=st.booleans())
    def fall_silent(self, who, silent):
        self.clients[who].silent = silent

    @rule(who=pick, blocked=st.booleans())
    def block_client(self, who, blocked):
        (self.world.blocked.add if blocked else self.world.blocked.discard)(self.clients[who].peer)

    @rule(which=pick, blocked=st.booleans())
    def block_group(self, which, blocked):
        (self.world.blocked.add if blocked else self.world.blocked.discard)(self.groups[which].peer)

    @rule(who=pick)
    def mumble(self, who):
        self.world.feed(Malformed(Face.CLIENTS, self.clients[who].peer, "nonsense"))
        self.world.settle()

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.5, 1.0, 4.5, 11.0, 25.0]))
    def wait(self, seconds):
        for _ in range(max(1, int(seconds * 2))):
            self.world.tick(min(seconds, 0.5))

    @rule()
    def pause_of_the_broker(self):
        """SIGSTOP and SIGCONT: a long gap between two ticks."""
        self.world.tick(30.0)

    @rule()
    def restart_broker(self):
        self.world.restart_broker()
        self.world.tick()

    @invariant()
    def what_was_read_is_right(self):
        for _, record in getattr(self, "all", ()):
            record.check()

    # -------------------------------------------------------------------------------------------------------- end

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self._mend()
        records = [record for _, record in self.all]
        self.world.finish(records)
        for record in records:
            record.check()
            self._check_end(record)
        self._check_empty()

    def _mend(self) -> None:
        self.world.blocked.clear()
        for group in self.groups:
            group.hung = False
            if not group.alive:
                group.start()
            elif group.frozen:
                group.thaw()
        for client in self.clients:
            client.acks, client.silent = True, False
            client.confirm(*client.records.values())
        self.world.settle()

    def _check_end(self, record: Record) -> None:
        allowed: list[type[Exception]] = [OverloadedError, UnavailableError, SlowConsumerError, WorkerCrashedError]
        if record.cancelled:
            allowed += [RequestCancelledError, UnknownRequestError]
        if self.versions:
            allowed.append(ModelChangedError)
        if record.request.budget_ms is not None:
            allowed.append(DeadlineExceededError)
        assert record.error is None or isinstance(record.error, tuple(allowed)), repr(record.error)
        if record.error is None and not record.cancelled:
            assert all(reason in ("stop", "length") for reason in record.reason)
        wanted = record.request.sampling.get("logprobs")
        if wanted is not None and record.error is None and not record.cancelled and max(record.attempt) == 1:
            assert [len(probs) for probs in record.logprobs] == [len(tokens) for tokens in record.tokens]

    def _check_empty(self) -> None:
        world, broker = self.world, self.world.broker
        for group in self.groups:
            if not group.alive:  # something poisonous was among what had to end
                group.start()
        for client in self.clients:
            client.confirm(*client.records.values())
        for _ in range(100):
            world.tick(0.95)  # a longer gap would be taken for a pause, and forgiven
        report = broker.report(world.now)
        assert report["requests"] == {"live": 0, "finished": 0}
        assert report["queue"] == {"depth": 0, "tokens": 0, "parked": 0}
        assert [group["running"] for group in report["groups"]] == [0, 0, 0]
        assert not any(group.rows for group in self.groups)
        assert not broker.delivery.waiting
        assert not broker.delivery.orphans
        assert not any(conn.unacked or conn.jobs or conn.dirty for conn in broker.delivery.connections.values())


def _poisoned(prompt: bytes) -> int | None:
    """The index at which a prompt takes its group down."""
    return prompt[4] if prompt[0] == POISON else None


BrokerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestBroker = BrokerMachine.TestCase
