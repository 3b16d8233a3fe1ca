"""The request table: what is remembered, for how long, and what never is dropped while somebody reads it."""

from __future__ import annotations

import pytest

from headrace.broker.delivery import Connection
from headrace.broker.requests import Job, JobTable, Stream
from headrace.messages import Finish, pack_tokens


def job(number: int, *, n: int = 1, output: int = 0, max_tokens: int = 8, **sampling) -> Job:
    made = Job(
        id=number.to_bytes(16),
        model="m",
        prompt=pack_tokens([1, 2, 3]),
        sampling={"seed": 1, "max_tokens": max_tokens, **sampling},
        digest=b"",
        stops=frozenset({7}),
        deadline=None,
        owner=b"c",
        now=0.0,
    )
    made.streams = [Stream(made, choice, 0, pack_tokens(range(10, 10 + output)), "f") for choice in range(n)]
    return made


def table(**limits) -> JobTable:
    return JobTable(**{"window": 10.0, "max_ended": 3, "max_ended_bytes": 1 << 20, **limits})


def ended(jobs: JobTable, number: int, now: float = 0.0, **settings) -> Job:
    made = job(number, **settings)
    jobs.add(made)
    for stream in made.streams:
        stream.finish = Finish(made.id, stream.choice, 1, "length", stream.have, 0)
    jobs.end(made, now)
    jobs.validate()
    return made


def read_by(made: Job, *, sent: int = 0, acked: int = 0, done: bool = False) -> Connection:
    conn = Connection(b"c", 0.0)
    conn.jobs[made.id] = made
    made.client = conn
    for stream in made.streams:
        stream.sent, stream.acked, stream.done_sent = sent, acked, done
        conn.unacked += (sent - acked) * stream.weight
    return conn


def test_a_live_job_is_found_and_forgotten_with_its_attempt():
    jobs, made = table(), job(1)
    jobs.add(made)
    assert jobs.get(made.id) is made
    assert list(jobs.streams()) == made.streams
    made.streams[0].attempt = 4
    jobs.forget(made)
    assert jobs.get(made.id) is None
    assert jobs.last_attempt(made.id) == 4
    assert jobs.last_attempt(b"never") == 0


def test_attempts_of_forgotten_jobs_are_kept_within_bounds():
    jobs = table()
    for number in range(5000):
        made = job(number)
        jobs.add(made)
        made.streams[0].attempt = 1
        jobs.forget(made)
    assert jobs.last_attempt((0).to_bytes(16)) == 0
    assert jobs.last_attempt((4999).to_bytes(16)) == 1


def test_an_ended_job_keeps_its_answer_and_frees_its_prompt():
    jobs = table()
    made = ended(jobs, 1, output=2)
    assert made.prompt == b""
    assert made.ended
    assert len(made.streams[0].output) == 8
    jobs.revive(made, b"prompt")
    assert not made.ended
    assert jobs.live == {made.id: made}


@pytest.mark.parametrize(("limits", "kept"), [({"max_ended": 3}, 3), ({"max_ended_bytes": 1200}, 2)])
def test_the_oldest_answers_go_first(limits, kept):
    jobs = table(**limits)
    for number in range(10):
        ended(jobs, number)
    assert list(jobs.ended) == [number.to_bytes(16) for number in range(10 - kept, 10)]


def test_answers_expire_after_the_window():
    jobs = table()
    ended(jobs, 1, now=0.0)
    ended(jobs, 2, now=5.0)
    jobs.expire(10.0)
    assert len(jobs.ended) == 2
    jobs.expire(10.1)
    assert list(jobs.ended) == [(2).to_bytes(16)]
    jobs.validate()


def test_what_is_still_being_read_outlives_every_bound():
    jobs = table(max_ended=1)
    slow = job(1, output=6)
    jobs.add(slow)
    slow.streams[0].finish = Finish(slow.id, 0, 1, "length", 6, 0)
    conn = read_by(slow, sent=3, acked=1)
    jobs.end(slow, 0.0)
    for number in range(2, 6):
        ended(jobs, number)
    jobs.expire(1000.0)
    assert slow.id in jobs.ended
    (stream,) = slow.streams
    stream.sent = stream.acked = 6
    conn.unacked = 0
    assert slow.owed  # its end is not yet said
    stream.done_sent = True
    assert not slow.owed
    jobs.expire(1000.0)
    assert not jobs.ended
    assert not conn.jobs
    jobs.validate()


def test_a_stream_that_is_complete_by_its_tokens():
    assert job(1, output=8).streams[0].conclusion() == "length"
    assert job(1, output=7).streams[0].conclusion() is None
    stopped = job(1)
    stopped.streams[0].adopt(pack_tokens([1, 7]), "f")
    assert stopped.streams[0].conclusion() == "stop"
    held_back = job(1, min_tokens=3)
    held_back.streams[0].adopt(pack_tokens([1, 7]), "f")
    assert held_back.streams[0].conclusion() is None
    assert job(1).streams[0].conclusion() is None
    both = job(1, max_tokens=2)
    both.streams[0].adopt(pack_tokens([1, 7]), "f")
    assert both.streams[0].conclusion() == "stop"  # what its group would have said


def test_runs_are_cut_from_the_output_with_their_logprobs():
    made = job(1, output=2, logprobs=0)
    (stream,) = made.streams
    stream.output += pack_tokens([20, 21, 22])
    stream.have = 5
    stream.logprobs = [[-1.0, []], [-2.0, []], [-3.0, []]]  # of what came here: the first two are the client's
    run = stream.run(3, 2)
    assert (run.first, run.tokens, run.logprobs) == (3, pack_tokens([21, 22]), [[-2.0, []], [-3.0, []]])
    assert made.weight == 4 + 16
    assert job(1).weight == 4
