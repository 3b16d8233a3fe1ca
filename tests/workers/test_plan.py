"""The plan: every rank makes the same calls in the same order, and ranks that differ do not go on."""

import dataclasses
import threading
from contextlib import contextmanager
from multiprocessing import Pipe

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import InternalError, InvalidRequestError, ProtocolError, from_wire
from headrace.messages import Assign, Assignment, Revoke, StreamId, pack_tokens
from headrace.workers.plan import PlanWriter, RevokeAll, carry_out, follow
from tests.support.children import LIMIT
from tests.support.fake_engine import FakeEngine


class Recorder(FakeEngine):
    """Keeps every call it gets, with its arguments, and every result."""

    def __init__(self, flip_at=None):
        super().__init__()
        self.calls = []
        self.results = []
        self.flip_at = flip_at

    def add(self, assignment, now):
        self.calls.append(("add", assignment, now))
        if assignment.sampling.get("bug"):
            raise ZeroDivisionError("in add")
        super().add(assignment, now)

    def revoke(self, stream):
        self.calls.append(("revoke", stream))
        super().revoke(stream)

    def revoke_all(self):
        self.calls.append(("revoke_all",))
        super().revoke_all()

    def step(self, now):
        self.calls.append(("step", now))
        result = super().step(now)
        if self.steps == self.flip_at:
            result.runs[0] = result.runs[0]._replace(tokens=pack_tokens([99_999]))
        self.results.append(result)
        return result


def assignment(request, attempt=1, choice=0, prompt=(1, 2), **sampling):
    return Assignment(
        request=bytes([request]) * 16,
        choice=choice,
        attempt=attempt,
        prompt=pack_tokens(prompt),
        sampling={"max_tokens": 4, "seed": 3} | sampling,
    )


class Follower(threading.Thread):
    """A rank that follows, as a thread."""

    def __init__(self, engine, pipe):
        super().__init__(daemon=True)
        self.engine, self.pipe = engine, pipe
        self.error = None

    def run(self):
        try:
            follow(self.engine, self.pipe)
        except InternalError as error:
            self.error = error
        finally:
            self.pipe.close()


@contextmanager
def group(*followers, check_every=64):
    """A leader that is a function of calls and time, and its followers."""
    pipes = [Pipe(duplex=False) for _ in followers]
    writer = PlanWriter([w for _, w in pipes], check_every=check_every)
    threads = [Follower(engine, r) for engine, (r, _) in zip(followers, pipes, strict=True)]
    for thread in threads:
        thread.start()
    leader = Recorder()

    def turn(calls, now):
        writer.send(calls, now)
        refusals, results = carry_out(leader, calls, now)
        writer.note(refusals, results)
        return refusals, results

    turn.leader, turn.threads, turn.stop = leader, threads, writer.stop
    try:
        yield turn
    finally:
        for _, w in pipes:
            w.close()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()


def test_three_ranks_make_the_same_calls_in_the_same_order():
    others = [Recorder(), Recorder()]
    with group(*others, check_every=2) as turn:
        turn([Assign(assignments=(assignment(1), assignment(2, max_tokens=9)))], 10.0)
        turn([], 10.5)
        turn([Revoke(streams=(StreamId(bytes([1]) * 16, 0, 1),)), Assign(assignments=(assignment(3),))], 11.0)
        while turn.leader.has_work:
            turn([], 12.0)
        turn([Assign(assignments=(assignment(1, attempt=2),)), RevokeAll()], 13.0)
        turn.stop()
    assert [thread.error for thread in turn.threads] == [None, None]
    assert len(turn.leader.calls) > 10
    for engine in others:
        assert engine.calls == turn.leader.calls
        assert engine.results == turn.leader.results


def test_a_step_is_computed_only_if_there_is_work():
    engine = Recorder()
    assert carry_out(engine, [RevokeAll()], 1.0) == ([], None)
    assert engine.calls == [("revoke_all",)]
    refusals, results = carry_out(engine, [Assign(assignments=(assignment(1),))], 2.0)
    assert not refusals
    assert len(results.runs) == 1


def test_what_one_request_does_to_the_engine_stays_with_it(caplog):
    """Both an error that says what is wrong and one that nobody thought of refuse one stream, on every rank alike."""
    other = Recorder()
    with group(other, check_every=1) as turn:
        bad, buggy, good = assignment(1, prompt=[99_999]), assignment(2, bug=True), assignment(3)
        refusals, results = turn([Assign(assignments=(bad, buggy, good))], 1.0)
        while turn.leader.has_work:
            turn([], 2.0)
        turn.stop()
    first, second = (from_wire(refusal.error) for refusal in refusals)
    assert isinstance(first, InvalidRequestError)
    assert first.param == "prompt"
    assert isinstance(second, InternalError)
    assert "ZeroDivisionError: in add" in second.message
    assert "could not be taken on" in caplog.text
    assert [run.request for run in results.runs] == [good.request]
    assert turn.threads[0].error is None
    assert other.calls == turn.leader.calls


def test_a_rank_that_computes_something_else_ends():
    honest, flipped = Recorder(), Recorder(flip_at=3)
    with group(honest, flipped, check_every=4) as turn:
        turn([Assign(assignments=(assignment(1, max_tokens=50),))], 1.0)
        for _ in range(3):
            turn([], 1.0)
        turn.threads[1].join(LIMIT)
        turn.stop()
    assert turn.threads[0].error is None
    assert "computed something else than its leader" in turn.threads[1].error.message
    assert len(flipped.results) == 3  # the comparison comes with the fourth turn, before it is carried out


def test_a_leader_that_vanishes_ends_its_followers():
    with group(Recorder()) as turn:
        turn([Assign(assignments=(assignment(1),))], 1.0)
    assert "leader of the group is gone" in turn.threads[0].error.message


def test_a_follower_that_vanished_is_noticed():
    reader, writer = Pipe(duplex=False)
    reader.close()
    plan = PlanWriter([writer])
    with pytest.raises(OSError, match="pipe"):
        plan.send([], 1.0)
    plan.stop()
    writer.close()


def test_prompts_of_any_size_and_bytes_pass():
    other = Recorder()
    prompts = [bytes([0, 1, 0, 0]) * 30_000, b"\0\0\0\0"]
    with group(other, check_every=1) as turn:
        for index, prompt in enumerate(prompts):
            big = dataclasses.replace(assignment(0, choice=index), prompt=prompt)
            turn([Assign(assignments=(big,))], 1.0)
            turn([RevokeAll()], 1.0)
        turn.stop()
    assert turn.threads[0].error is None
    assert other.calls == turn.leader.calls


_calls = st.lists(
    st.one_of(
        st.builds(
            lambda entries: Assign(assignments=tuple(assignment(*e) for e in entries)),
            st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=3),
        ),
        st.builds(
            lambda entries: Revoke(streams=tuple(StreamId(bytes([r]) * 16, c, a) for r, c, a in entries)),
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(1, 3)), max_size=3),
        ),
        st.just(RevokeAll()),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_calls, st.floats(0, 1e6)), max_size=12))
def test_any_plan_is_carried_out_alike(turns):
    other = Recorder()
    with group(other, check_every=1) as turn:
        for calls, now in turns:
            turn(calls, now)
        turn.stop()
    assert turn.threads[0].error is None
    assert other.calls == turn.leader.calls
    assert other.results == turn.leader.results


def test_without_followers_nothing_is_encoded():
    class Unencodable:
        pass

    with group(check_every=1) as turn:
        turn([Unencodable()], 1.0)
    with pytest.raises(ProtocolError), group(Recorder()) as turn:
        turn([Unencodable()], 1.0)
