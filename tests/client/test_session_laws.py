"""All laws of the session, whatever a broker says and whenever it says it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.client.events import Ask, Drop
from headrace.errors import (
    ContextLengthError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
    UnknownRequestError,
)
from headrace.messages import (
    Describe,
    TokenRun,
    Tokens,
    Welcome,
)
from tests.client.probe import spec, tokens_of
from tests.client.talk import Talk

# ------------------------------------------------------------- all laws, whatever a broker says and whenever it says it

CHOICES = 2
TOTAL = 6
STEP = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([0.05, 0.3, 1.2, 4.5, 12.0])),
    st.tuples(st.just("welcome")),
    st.tuples(st.just("accept"), st.integers(0, 2)),
    st.tuples(
        st.just("run"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.integers(0, 6), st.integers(0, 4)
    ),
    st.tuples(st.just("done"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.sampled_from([0, 3, 6])),
    st.tuples(st.just("error"), st.integers(0, 3), st.sampled_from(["unknown", "busy", "bad", "protocol", "stopping"])),
    st.tuples(st.just("start"), st.just(0)),
    st.tuples(st.just("ask"), st.just(0)),
    st.tuples(st.just("drop"), st.integers(1, 4)),
)
ERRORS = {
    "unknown": UnknownRequestError("unknown"),
    "busy": OverloadedError("full"),
    "bad": ContextLengthError("long"),
    "protocol": ProtocolError("Say Hello first."),
    "stopping": UnavailableError("stopping"),
}


@settings(deadline=None, max_examples=400)
@given(steps=st.lists(STEP, max_size=60))
def test_the_laws_hold_whatever_happens(steps):
    talk = Talk(first_token=60, between_tokens=20)
    probe = talk.probe
    next_ticket = 1

    def ids():
        """Names that the broker may know: of the requests under way, and one of nobody."""
        return [*(flight.id for flight in probe.session.flights()), b"?" * 16]

    for step, *args in steps:
        known = ids()
        id = known[args[0] % len(known)] if args and isinstance(args[0], int) else b""
        seed = next((f.sampling["seed"] for f in probe.session.flights() if f.id == id), 0)
        match step:
            case "wait":
                talk.wait(args[0], broker=args[0] < 4)
            case "welcome":
                talk.hear(Welcome())
            case "accept":
                talk.accept(id)
            case "run":
                _, choice, attempt, first, count = args
                tokens = tokens_of(seed, choice, first, count)
                talk.hear(Tokens(runs=(TokenRun(id, choice, attempt, first, tokens, None),)))
            case "done":
                talk.done(id, args[3], choice=args[1], attempt=args[2])
            case "error":
                talk.error(ERRORS[args[1]], b"" if args[0] == 3 else id)
            case "start":
                probe.start({next_ticket: spec(next_ticket, choices=CHOICES, max_tokens=TOTAL)}, talk.now)
                next_ticket += 1
            case "ask":
                probe.feed(Ask(next_ticket, Describe()), talk.now)
                next_ticket += 1
            case "drop":
                probe.feed(Drop(args[0]), talk.now)
    dropped = {step[1] for step in steps if step[0] == "drop"}
    talk.wait(200, broker=False)  # everything ends by itself, one way or the other
    assert list(probe.session.flights()) == []
    assert probe.session.idle
    assert all(outcome.over for ticket, outcome in probe.outcomes.items() if ticket not in dropped)
