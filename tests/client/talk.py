"""A session under test with a clock, and short words for what happens to it."""

from random import Random

from headrace.client.events import Received, Tick
from headrace.client.session import Session
from headrace.client.types import Timeouts
from headrace.messages import (
    Acceptance,
    Accepted,
    Done,
    Error,
    Finish,
    Ping,
    Pong,
    TokenRun,
    Tokens,
    Welcome,
)
from tests.client.probe import Probe, spec, tokens_of

SEED = 7


class Talk:
    """A probe with a clock, and short words for what happens to it."""

    def __init__(self, *, retries=2, **timeouts):
        limits = Timeouts(**{"connect": 5.0, "first_token": 120.0, "between_tokens": 30.0, **timeouts})
        session = Session("ipc:///here", timeouts=limits, retries=retries, random=Random(1), name="test")
        self.probe = Probe(session)
        self.now = 100.0

    @property
    def link(self):
        return self.probe.session.link

    def start(self, ticket=1, **settings):
        return self.probe.start({ticket: spec(SEED + ticket, **settings)}, self.now)

    def hear(self, message):
        return self.probe.feed(Received(message), self.now)

    def error(self, error, request=b""):
        return self.hear(Error(error=error.to_wire(), request=request))

    def wait(self, seconds, *, broker=True):
        """Let time pass; a living broker answers pings."""
        said = []
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.1)
            heard = self.probe.feed(Tick(), self.now)
            said += heard
            for message in heard:
                if broker and isinstance(message, Ping):
                    self.hear(Pong(nonce=message.nonce))
        return said

    def greet(self):
        """Start one request on a good connection; returns its id."""
        self.start()
        (submit,) = self.hear(Welcome(broker="b"))
        return submit.requests[0].id

    def accept(self, id):
        return self.hear(Accepted(requests=(Acceptance(id, SEED + 1, 8),)))

    def run(self, id, first, count, *, ticket=1, choice=0, attempt=1):
        tokens = tokens_of(SEED + ticket, choice, first, count)
        return self.hear(Tokens(runs=(TokenRun(id, choice, attempt, first, tokens, None),)))

    def done(self, id, total, *, choice=0, attempt=1, reason="length"):
        return self.hear(Done(finishes=(Finish(id, choice, attempt, reason, total, 0),)))

    def outcome(self, ticket=1):
        return self.probe.outcomes[ticket]
