"""Makes what a caller reads out of what the session reports: deltas as tokens come, a completion at the end.

One `Assembler` per request, run by whoever reads it: text work of one reader never delays another's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from headrace.client.events import Ended, Failed, News, NewTokens
from headrace.client.prepare import Prepared
from headrace.client.stops import StopFinder
from headrace.client.text import Text
from headrace.client.types import Choice, Completion, Delta, TokenLogprob, TopLogprob, Usage
from headrace.errors import HeadraceError

__all__ = ["Assembler"]


class Assembler:
    """Collects one request.

    Attributes:
        id: of the request on the wire, in hexadecimal; empty until the first token.
        error: the error that ended it, if one did.
    """

    def __init__(self, prepared: Prepared) -> None:
        sampling = prepared.sampling
        end_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            end_ids.update(prepared.card.eos_token_ids)
        self._prepared = prepared
        self._parts = [_Part(number, prepared, frozenset(end_ids)) for number in range(sampling.n)]
        self._cached = 0
        self.id = ""
        self.error: HeadraceError | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come that matters."""
        return self.error is not None or all(part.reason is not None for part in self._parts)

    def feed(self, news: News) -> list[Delta]:
        """The deltas that the news make."""
        match news:
            case NewTokens():
                self.id = news.request.hex()
                return self._parts[news.choice].tokens(news.tokens, news.logprobs)
            case Ended():
                self.id = news.request.hex()
                self._cached = max(self._cached, news.cached)
                return self._parts[news.choice].end(news.reason)
            case Failed():
                self.error = news.error
        return []

    def abandon(self) -> list[Delta]:
        """The reader stops here: what is there stays, as cancelled."""
        return [delta for part in self._parts for delta in part.end("cancelled")]

    def completion(self) -> Completion:
        """Everything so far.

        Raises:
            HeadraceError: the request failed.
        """
        if self.error is not None:
            raise self.error
        choices = tuple(part.choice() for part in self._parts)
        prompt = len(self._prepared.prompt)
        total = sum(len(choice.token_ids) for choice in choices)
        return Completion(self.id, self._prepared.card.name, prompt, choices, Usage(prompt, total, self._cached))


class _Part:
    """One choice."""

    def __init__(self, number: int, prepared: Prepared, end_ids: frozenset[int]) -> None:
        self._number = number
        self._text = prepared.text
        self._detokenizer = prepared.text.detokenizer(prepared.prompt)
        self._stops = StopFinder(prepared.sampling.stop)
        self._end_ids = end_ids
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if prepared.sampling.logprobs is None else []
        self.reason: str | None = None

    def tokens(self, tokens: Sequence[int], logprobs: list[Any] | None) -> list[Delta]:
        if self.reason is not None:
            return []  # the engine had not heard yet that a stop string ended it
        pieces: list[str] = []
        used = 0
        for token in tokens:
            used += 1
            # The token that ends a text is no part of it, special or not.
            if token not in self._end_ids:
                pieces.append(self._stops.feed(self._detokenizer.step(token)))
            if self._stops.hit is not None:
                self.reason = "stop"
                break
        ids = tuple(tokens[:used])
        details = None
        if self._logprobs is not None:
            details = tuple(_logprobs(self._text, ids, logprobs or ()))
            self._logprobs.extend(details)
        self._ids.extend(ids)
        return [self._delta("".join(pieces), ids, details)]

    def end(self, reason: str) -> list[Delta]:
        if self.reason is not None:
            return []
        text = self._stops.feed(self._detokenizer.flush(), final=True)
        self.reason = "stop" if self._stops.hit is not None else reason
        return [self._delta(text, (), None if self._logprobs is None else ())]

    def choice(self) -> Choice:
        return Choice(
            self._number,
            "".join(self._pieces),
            tuple(self._ids),
            self.reason or "cancelled",
            None if self._logprobs is None else tuple(self._logprobs),
        )

    def _delta(self, text: str, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] | None) -> Delta:
        self._pieces.append(text)
        return Delta(self._number, text, ids, logprobs, self.reason)


def _logprobs(text: Text, ids: Iterable[int], wire: Iterable[Any]) -> Iterable[TokenLogprob]:
    for token_id, (logprob, top) in zip(ids, wire, strict=False):
        likeliest = tuple(TopLogprob(*_named(text, other), float(value)) for other, value in top)
        yield TokenLogprob(*_named(text, token_id), float(logprob), likeliest)


def _named(text: Text, token_id: int) -> tuple[str, int, bytes]:
    shown, raw = text.token(token_id)
    return shown, token_id, raw
