"""The laws of the leader's core, under any sequence of events."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.messages import (
    Assign,
    Done,
    Finish,
    GetBlob,
    GroupHello,
    GroupWelcome,
    Refusal,
    Refused,
    Reset,
    Revoke,
    StreamId,
    TokenRun,
)
from headrace.workers.leader import Link
from headrace.workers.leader_events import (
    Beat,
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
from tests.support.leader_core import A, B, assign, make_leader, results

_streams = st.tuples(st.sampled_from([A, B]), st.integers(0, 1), st.integers(1, 3))
_events = st.one_of(
    st.lists(_streams, min_size=1, max_size=3).map(lambda streams: assign(*streams)),
    st.lists(_streams.map(lambda s: StreamId(*s)), max_size=3).map(lambda s: Received(Revoke(streams=tuple(s)))),
    st.lists(_streams, max_size=4).map(lambda s: Stepped(results([TokenRun(*n, 0, b"abcd", None) for n in s]), 1)),
    st.lists(_streams, max_size=2).map(lambda s: Stepped(results(finishes=[Finish(*n, "stop", 1, 0) for n in s]), 1)),
    st.lists(_streams, max_size=2).map(lambda s: Refusals([Refusal(*n, {}) for n in s])),
    st.sampled_from(
        [
            Received(GroupWelcome()),
            Received(Reset()),
            Received(GetBlob(hash="x")),
            LinkLost(),
            Blocked(),
            Flowing(),
            Tick(),
            Beat(),
            Drain(5.0),
        ]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_events, st.floats(0.0, 12.0)), max_size=40))
def test_the_laws_hold_under_any_sequence(events):
    leader = make_leader()
    now = 0.0
    connected = greeted = ended = False
    held = {}  # what a faithful engine would hold, from the calls alone
    for event, pause in events:
        now += pause
        if isinstance(event, Blocked | Flowing) and leader.link is not Link.READY:
            continue  # the shell says so only of a socket that it has
        for action in leader.handle(event, now):
            assert not ended
            match action:
                case Connect():
                    assert not connected
                    connected, greeted = True, False
                case Disconnect():
                    connected = False
                case Call(Assign() as call):
                    for a in call.assignments:
                        held[a.request, a.choice] = max(a.attempt, held.get((a.request, a.choice), 0))
                case Call(Revoke() as call):
                    for request, choice, attempt in call.streams:
                        if held.get((request, choice), attempt + 1) <= attempt:
                            del held[request, choice]
                case Call():
                    held.clear()
                case Send(message):
                    assert connected
                    assert greeted or isinstance(message, GroupHello)
                    assert not (greeted and isinstance(message, GroupHello))
                    greeted = True
                    named = getattr(message, "runs", getattr(message, "finishes", ()))
                    assert all(held.get(entry[:2]) == entry[2] for entry in named)
                    if isinstance(message, Done | Refused):
                        for entry in getattr(message, "finishes", getattr(message, "refusals", ())):
                            if held.get(entry[:2]) == entry[2]:
                                del held[entry[:2]]
                case End():
                    ended = True
        leader.validate()
