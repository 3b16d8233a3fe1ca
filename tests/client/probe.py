"""A client session under watch: whatever happens to it, its laws are asserted after every event.

Readable by construction: a request's token at an index follows from its seed and choice (`token_at`), so a repeated,
missing or altered token is a wrong one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from headrace.client.events import (
    Connect,
    Disconnect,
    Emit,
    Ended,
    Event,
    Failed,
    NewTokens,
    Received,
    Send,
    Spec,
    Start,
)
from headrace.client.link import Link
from headrace.client.session import Session
from headrace.errors import HeadraceError
from headrace.messages import Hello, Message, Submit, Welcome, pack_tokens

__all__ = ["Outcome", "Probe", "spec", "token_at", "tokens_of"]


def token_at(seed: int, choice: int, index: int) -> int:
    """The token that is right there."""
    digest = hashlib.blake2b(f"{seed}/{choice}/{index}".encode(), digest_size=1).digest()
    return digest[0]


def tokens_of(seed: int, choice: int, first: int, count: int) -> bytes:
    """Right tokens, packed."""
    return pack_tokens(token_at(seed, choice, index) for index in range(first, first + count))


def spec(seed: int, *, choices: int = 1, max_tokens: int = 8, timeout: float | None = None, **sampling: Any) -> Spec:
    """A request whose tokens are known."""
    sampling = {"seed": seed, "max_tokens": max_tokens, **({"n": choices} if choices > 1 else {}), **sampling}
    return Spec(
        model="fake",
        prompt=pack_tokens([1, 2, 3]),
        sampling=sampling,
        choices=choices,
        fingerprint="f0",
        timeout=timeout,
    )


@dataclass
class Outcome:
    """What the caller of one ticket has heard."""

    spec: Spec | None = None
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[Any]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    error: HeadraceError | None = None
    answer: Any = None
    over: bool = False
    dropped: bool = False
    started_at: float = 0.0
    ended_at: float = 0.0

    @property
    def completed(self) -> bool:
        """Whether all choices ended well."""
        return self.over and self.error is None


class Probe:
    """Feeds a session, and checks everything that comes out of it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.outcomes: dict[int, Outcome] = {}
        self.connected = False
        self.connections = 0  # so far
        self.welcomed = False

    def start(self, requests: dict[int, Spec], now: float) -> list[Message]:
        """Submit requests."""
        for ticket, each in requests.items():
            nothing: list[list[Any]] = [[] for _ in range(each.choices)]
            self.outcomes[ticket] = Outcome(each, nothing, [list(row) for row in nothing], started_at=now)
        return self.feed(Start(tuple(requests.items())), now)

    def feed(self, event: Event, now: float) -> list[Message]:
        """What the session says to the broker because of this."""
        if isinstance(event, Received) and isinstance(event.message, Welcome) and self.connected:
            self.welcomed = True
        said: list[Message] = []
        for action in self.session.handle(event, now):
            match action:
                case Connect():
                    assert not self.connected
                    self.connected, self.welcomed = True, False
                    self.connections += 1
                    said.clear()
                case Disconnect():
                    self.connected = False
                    if self.session.link is not Link.CLOSED:  # then the last words may still go out
                        said.clear()
                case Send():
                    self._check_sent(action.message)
                    said.append(action.message)
                case Emit():
                    self._check_told(action, now)
        self.session.validate()
        return said

    def _check_sent(self, message: Message) -> None:
        assert self.connected
        assert self.welcomed or isinstance(message, Hello), f"{type(message).__name__} was said before Welcome"
        assert not (self.welcomed and isinstance(message, Hello))
        if isinstance(message, Submit):
            for request in message.requests:
                outcome = self._outcome_of(request.sampling["seed"])
                assert not outcome.over
                held = [pack_tokens(tokens) for tokens in outcome.tokens]
                assert list(request.output) == (held if any(held) else [])
                assert bool(request.fingerprint) == any(held)

    def _check_told(self, emit: Emit, now: float) -> None:
        outcome = self.outcomes.setdefault(emit.ticket, Outcome())
        assert not outcome.over, "there was news after the last"
        outcome.over = emit.last
        outcome.ended_at = now
        match emit.news:
            case NewTokens(_, choice, tokens, logprobs):
                assert outcome.spec is not None
                assert choice not in outcome.reasons
                assert tokens
                self._check_tokens(outcome, choice, list(tokens), logprobs)
            case Ended(_, choice, reason, _):
                assert choice not in outcome.reasons, "a choice ended twice"
                outcome.reasons[choice] = reason
                assert emit.last == (len(outcome.reasons) == len(outcome.tokens))
            case Failed(error):
                assert emit.last
                outcome.error = error
            case answer:
                assert emit.last
                outcome.answer = answer.value

    def _check_tokens(self, outcome: Outcome, choice: int, tokens: list[int], logprobs: list[Any] | None) -> None:
        assert outcome.spec is not None
        seed, have = outcome.spec.sampling["seed"], outcome.tokens[choice]
        assert tokens == [token_at(seed, choice, len(have) + number) for number in range(len(tokens))]
        have.extend(tokens)
        if logprobs is not None:
            assert len(logprobs) == len(tokens)
            outcome.logprobs[choice].extend(logprobs)

    def _outcome_of(self, seed: int) -> Outcome:
        return next(o for o in self.outcomes.values() if o.spec is not None and o.spec.sampling["seed"] == seed)
