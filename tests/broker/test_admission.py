"""The broker's contract, a test for each line: what is refused at once, what may wait, and for how long."""

from __future__ import annotations

import pytest

from headrace.broker.events import Face
from headrace.errors import (
    ConflictError,
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelChangedError,
    OverloadedError,
    UnknownModelError,
)
from headrace.messages import Error, Request, Submit, pack_tokens
from headrace.sampling import SamplingParams
from tests.broker.world import World, card, emit, request, text

BIG = tuple(range(1, 101))


def refused(world, client, *requests):
    """Submit what must be refused; the errors."""
    records = client.submit(*requests)
    world.settle()
    assert all(record.error is not None for record in records)
    return [record.error for record in records]


# -------------------------------------------------------------------------------------------------- impossible


@pytest.mark.parametrize(
    ("settings", "kind", "param"),
    [
        ({"temperature": -1.0}, InvalidRequestError, "temperature"),
        ({"n": 17}, InvalidRequestError, "n"),
        ({"max_tokens": 0}, InvalidRequestError, "max_tokens"),
        ({"min_tokens": 9}, InvalidRequestError, "min_tokens"),
        ({"min_tokens": 5000, "max_tokens": None}, InvalidRequestError, "min_tokens"),
        ({"prompt": ()}, InvalidRequestError, "prompt"),
        ({"prompt": (1, 256)}, InvalidRequestError, "prompt"),
        ({"logit_bias": [[256, 1.0]]}, InvalidRequestError, "logit_bias"),
        ({"output": (pack_tokens([1]),) * 2}, InvalidRequestError, "output"),
        ({"output": (pack_tokens([256]),)}, InvalidRequestError, "output"),
        ({"output": (b"odd bytes",)}, InvalidRequestError, "output"),
        ({"output": (pack_tokens([1] * 9),)}, InvalidRequestError, "output"),
        ({"attempt": -1}, InvalidRequestError, "attempt"),
        ({"attempt": 2**31}, InvalidRequestError, "attempt"),
        ({"fingerprint": "f" * 1000}, InvalidRequestError, "fingerprint"),
        ({"output": (pack_tokens([1]),), "fingerprint": "other"}, ModelChangedError, None),
        ({"max_tokens": 4094}, ContextLengthError, "max_tokens"),
        ({"prompt": (1,) * 4096, "max_tokens": 1}, ContextLengthError, "prompt"),
        ({"prompt": (1,) * 4096, "max_tokens": None}, ContextLengthError, "prompt"),
        ({"budget_ms": 0}, DeadlineExceededError, None),
        ({"budget_ms": -5}, DeadlineExceededError, None),
        ({"model": "other"}, UnknownModelError, "model"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_at_once_by_name(settings, kind, param):
    world = World()
    group, client = world.group(), world.client()
    (error,) = refused(world, client, request(1, **settings))
    assert type(error) is kind
    assert error.param == param
    assert error.request_id == (1).to_bytes(16).hex()
    assert not group.assigned
    assert world.broker.counters.rejected == {error.code: 1}


@pytest.mark.parametrize("id", [b"", b"short", b"x" * 17, b"x" * 100_000])
def test_an_id_has_sixteen_bytes(id):
    world = World()
    world.group()
    client = world.client()
    client.send(Submit(requests=(Request(id=id, model="m", prompt=pack_tokens([1])),)))
    world.settle()
    (answer,) = [message for message in client.said if isinstance(message, Error)]
    assert answer.error["param"] == "id"
    assert len(answer.request) <= 64


def test_the_largest_possible_request_fits_exactly():
    world = World()
    world.group(model=card(max_model_len=16))
    client = world.client()
    (record,) = world.run(client, request(1, prompt=(1,) * 10, max_tokens=6))
    assert record.max_tokens == 6


def test_a_request_may_not_exceed_what_the_kv_cache_of_some_group_holds():
    world = World()
    world.group(kv_tokens=20)
    client = world.client()
    (error,) = refused(world, client, request(1, max_tokens=18))
    assert isinstance(error, ContextLengthError)


def test_a_submit_of_too_many_requests_is_dropped_whole():
    world = World()
    world.group()
    client = world.client()
    one = request(1)
    client.send(Submit(requests=(one,) * 4097))
    world.settle()
    assert [error.code for error in client.errors] == ["protocol_error"]
    assert not world.broker.jobs.live


def test_a_time_budget_beyond_reason_does_no_harm():
    """2**64 - 1 ms once became a number that msgpack cannot write, on the way to the leader."""
    world = World()
    group, client = world.group(), world.client()
    (record,) = world.run(client, request(1, budget_ms=2**64 - 1))
    assert record.error is None
    assert 0 < group.assigned[0].budget_ms <= 2**40


# -------------------------------------------------------------------------------------------------- bounds


def test_the_queue_is_bounded_in_requests():
    world = World(max_queued_requests=10, client_share=1.0)
    group, client = world.group(rows=2), world.client()
    records = client.submit(*(request(n) for n in range(1, 21)))
    world.settle()
    refused_ones = [record for record in records if record.error is not None]
    assert len(refused_ones) == 8
    assert {type(record.error) for record in refused_ones} == {OverloadedError}
    assert all(record.error.retry_after >= 1.0 for record in refused_ones)
    world.finish(records)
    assert len(group.assigned) == 12


def test_the_queue_is_bounded_over_all_models_and_counts_choices():
    world = World(max_queued_requests=10, client_share=1.0)
    world.group("g0", rows=1, model=card("a"))
    world.group("g1", rows=1, model=card("b"))
    client = world.client()
    fit = client.submit(*(request(n, model="a", n=3) for n in (1, 2)))
    too_many, one_more = client.submit(request(3, model="b", n=6), request(4, model="b", n=5))
    world.settle()
    assert isinstance(too_many.error, OverloadedError)
    world.finish([*fit, one_more])


def test_the_queue_is_bounded_in_prompt_tokens():
    world = World(max_queued_tokens=250)
    world.group(rows=1)
    client = world.client()
    records = client.submit(*(request(n, prompt=BIG) for n in range(1, 6)))
    world.settle()
    assert [record.error is None for record in records] == [True, True, True, False, False]
    assert isinstance(records[-1].error, OverloadedError)


def test_the_bound_in_tokens_follows_the_kv_cache():
    world = World()
    world.group(rows=1, kv_tokens=120)
    client = world.client()
    records = client.submit(*(request(n, prompt=BIG) for n in range(1, 15)))
    world.settle()
    assert sum(record.error is None for record in records) == 1 + 9


def test_a_prompt_larger_than_the_bound_runs_if_nobody_waits():
    world = World(max_queued_tokens=10)
    world.group(rows=1)
    client = world.client()
    (record,) = world.run(client, request(1, prompt=BIG))
    assert record.error is None


def test_one_connection_gets_its_share_of_the_queue_only():
    world = World(max_queued_requests=20, client_share=0.5)
    world.group(rows=1)
    greedy, modest = world.client("greedy"), world.client("modest")
    first = greedy.submit(*(request(n) for n in range(1, 20)))
    world.settle()
    assert sum(record.error is None for record in first) == 1 + 10
    second = modest.submit(*(request(n) for n in range(30, 35)))
    world.settle()
    assert all(record.error is None for record in second)
    world.finish([*first, *second])


def test_a_single_request_of_one_is_not_behind_all_of_another():
    world = World()
    group, busy, other = world.group(rows=1), world.client("busy"), world.client("other")
    busy.submit(*(request(n, max_tokens=1) for n in range(1, 101)))
    world.settle()
    (single,) = other.submit(request(200, max_tokens=1))
    world.settle()
    world.step(3)
    assert single.ended
    assert len(group.assigned) <= 5


def test_what_comes_in_one_turn_may_use_the_free_rows_first():
    world = World(max_queued_requests=4, client_share=1.0)
    world.group(rows=8)
    client = world.client()
    records = client.submit(*(request(n) for n in range(1, 13)))
    world.settle()
    assert all(record.error is None for record in records)


def test_a_refused_id_can_be_used_again():
    world = World(max_queued_requests=1)
    world.group(rows=1)
    client = world.client()
    first, second, third = client.submit(*(request(n) for n in (1, 2, 3)))
    world.settle()
    assert isinstance(third.error, OverloadedError)
    world.finish([first, second])
    client.records.clear()
    (again,) = world.run(client, request(3))
    assert again.error is None


def test_a_burst_of_ten_times_the_capacity_is_answered_to_the_last():
    world = World(max_queued_requests=100, client_share=1.0)
    world.group(rows=8)
    client = world.client()
    records = client.submit(*(request(n, max_tokens=2) for n in range(1, 1101)))
    world.settle()
    assert sum(record.error is None for record in records) == 108
    assert world.broker.report(world.now)["queue"]["depth"] == 100
    world.finish(records)
    assert world.broker.report(world.now)["queue"]["depth"] == 0


def test_a_burst_of_refusals_waits_for_a_reader_that_is_blocked_for_a_moment():
    """More refusals than a blocked connection may keep once cost it the connection."""
    world = World(max_queued_requests=100, client_share=1.0)
    world.group(rows=8)
    client = world.client()
    world.blocked.add(client.peer)
    records = client.submit(*(request(n, max_tokens=2) for n in range(1, 2001)))
    world.settle()
    world.tick()
    world.blocked.clear()
    for _ in range(10):
        world.tick()
    assert sum(record.error is not None for record in records) == 2000 - 108
    world.finish(records)


# -------------------------------------------------------------------------------------------------- deadlines


def test_the_budget_is_carried_on_as_what_is_left():
    world = World()
    group, client = world.group(rows=1), world.client()
    first, second = client.submit(request(1, max_tokens=4), request(2, budget_ms=10_000))
    world.settle()
    world.wait(2.0)
    world.step(4)
    assert first.ended
    assert group.assigned[1].budget_ms == pytest.approx(8000, abs=2)
    assert group.assigned[0].budget_ms is None
    world.finish([second])


def test_a_deadline_passes_in_the_queue_without_costing_a_row():
    world = World()
    group, client = world.group(rows=1), world.client()
    first, late = client.submit(request(1, max_tokens=100), request(2, budget_ms=1000))
    world.settle()
    world.wait(1.2)
    assert isinstance(late.error, DeadlineExceededError)
    assert len(group.assigned) == 1
    world.finish([first])


def test_a_deadline_is_looked_at_when_a_row_is_given():
    """Between two ticks a row becomes free for a request whose time is over already."""
    world = World()
    group, client = world.group(rows=1), world.client()
    first, late, next_one = client.submit(request(1, max_tokens=1), request(2, budget_ms=50), request(3))
    world.settle()
    world.now += 0.06
    world.step()
    assert first.ended
    assert isinstance(late.error, DeadlineExceededError)
    assert [assignment.request for assignment in group.assigned] == [first.request.id, next_one.request.id]


def test_a_deadline_passes_while_it_runs():
    world = World()
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, max_tokens=4000, budget_ms=2000, n=2))
    world.settle()
    world.step(5)
    world.wait(2.2)
    assert isinstance(record.error, DeadlineExceededError)
    assert len(record.tokens[0]) == 5
    assert not group.rows


# ------------------------------------------------------------------------------- what a client brings back


def test_tokens_that_a_client_brings_back_are_looked_at_as_closely():
    """A resubmission of a known id once skipped the look at its token ids."""
    world = World()
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1))
    world.settle()
    wrong = request(1, output=(pack_tokens([9999]),), attempt=1, fingerprint="f0")
    client.send(Submit(requests=(wrong,)))
    world.settle()
    assert isinstance(record.error, InvalidRequestError)
    assert len(group.assigned) == 1


@pytest.mark.parametrize("held", [5, 20])
def test_a_client_may_hold_more_of_every_choice_than_an_ended_request(held):
    """The end of the first choice taken up once ended the request again, under the second one."""
    world = World()
    world.group()
    client = world.client()
    (record,) = client.submit(request(1, n=2, max_tokens=20))
    world.settle()
    world.step(3)
    client.cancel(record)
    world.settle()
    whole = [text(1, choice, 20)[0] for choice in range(2)]
    client.records.clear()
    outputs = tuple(pack_tokens(tokens[:held]) for tokens in whole)
    (record,) = client.submit(request(1, n=2, max_tokens=20, output=outputs, attempt=1, fingerprint="f0"))
    world.finish([record])
    assert [list(tokens) for tokens in record.tokens] == whole


def test_streams_that_come_back_have_room_of_their_own():
    world = World(max_queued_requests=4, client_share=1.0)
    world.group(rows=1)
    client = world.client()
    fresh = client.submit(*(request(n, max_tokens=30) for n in range(1, 6)))
    world.settle()
    held = [pack_tokens(emit(n, 0, index) for index in range(3)) for n in range(11, 15)]
    back = client.submit(
        *(
            request(n, output=(output,), attempt=1, fingerprint="f0")
            for n, output in zip(range(11, 15), held, strict=True)
        )
    )
    world.settle()
    assert all(record.error is None for record in [*fresh, *back])
    world.finish([*fresh, *back])


def test_a_conflict_is_no_end_for_the_request_that_has_the_id():
    world = World()
    world.group()
    client = world.client()
    (record,) = client.submit(request(1))
    client.send(Submit(requests=(request(1, max_tokens=9),)))
    world.settle()
    answers = [message.error["code"] for message in client.said if isinstance(message, Error)]
    assert answers == [ConflictError.code]
    world.finish([record])
    assert list(record.tokens[0]) == text(1, 0, 8)[0]


def test_settings_are_checked_once_if_the_request_leaves_none_open(monkeypatch):
    """A client's library says seed and length; each check more of all settings would delay its first token."""
    checks = []
    check = SamplingParams.__post_init__
    monkeypatch.setattr(SamplingParams, "__post_init__", lambda self: (checks.append(self), check(self)))
    world = World()
    world.group()
    client = world.client()
    checks.clear()
    record = request(1, seed=5, max_tokens=3)
    world.receive(Face.CLIENTS, client.peer, Submit(requests=(record,)))
    assert len(checks) == 1
