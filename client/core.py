"""What `Client` and `AsyncClient` share: everything but the way of waiting."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Sequence
from random import SystemRandom
from typing import TYPE_CHECKING, Any, TypeVar

from headrace.addresses import client_endpoint
from headrace.client.assemble import Assembler
from headrace.client.catalog import Catalog
from headrace.client.events import Answer, Failed, News
from headrace.client.inbox import Box, Inbox
from headrace.client.prepare import Prepared
from headrace.client.session import Session
from headrace.client.transport import Sink, Transport
from headrace.client.types import Completion, Delta, Timeouts
from headrace.client.wish import AnyWish, Ready
from headrace.errors import InvalidRequestError, RequestCancelledError
from headrace.messages import Message

if TYPE_CHECKING:
    from headrace.client.text import Text

__all__ = ["Core", "Face", "Reading"]

_TIMEOUTS = Timeouts()
R = TypeVar("R", bound=Ready)
_LONG = 8192  # characters; tokenizing more may take longer than an event loop should stand still


class Core:
    """One client's transport, session and catalog."""

    def __init__(self, endpoint: str | None, timeouts: Timeouts, retries: int) -> None:
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InvalidRequestError(f"retries is {retries!r}; give a whole number from 0.", param="retries")
        self.endpoint = endpoint or client_endpoint()
        self.timeouts = timeouts
        session = Session(
            self.endpoint, timeouts=timeouts, retries=retries, random=SystemRandom(), name=f"pid {os.getpid()}"
        )
        self.transport = Transport(self.endpoint, session)
        self.catalog = Catalog(self.ask, retries)

    def ask(self, question: Message) -> Any:
        """A question and its answer, waiting for it.

        Raises:
            HeadraceError: there is no broker, or it refused.
        """
        inbox: Inbox[News] = Inbox()
        ticket = self.transport.ask(question, inbox)
        try:
            news = inbox.get()
        except BaseException:
            self.transport.drop(ticket)
            raise
        if isinstance(news, Failed):
            raise news.error
        assert isinstance(news, Answer)
        return news.value

    def at_hand(self, wishes: Sequence[AnyWish[Ready]]) -> Text | None:
        """The text of the model that the wishes name, if it needs no question and they are soon tokenized."""
        if not wishes or sum(wish.size for wish in wishes) > _LONG:
            return None
        return self.catalog.known_text(wishes[0].model)

    def prepare(self, wish: AnyWish[R], text: Text | None = None) -> R:
        """The request that a wish makes of its model; waits for the broker if the model's text is not given.

        Raises:
            HeadraceError: a value is wrong, or there is no broker, or no such model.
        """
        return wish.prepare(text or self.catalog.text(wish.model), self.timeouts.total)

    def launch(self, requests: Sequence[tuple[Ready, Sink]]) -> list[int]:
        """Submit requests together; returns their tickets."""
        return self.transport.start((prepared.spec, sink) for prepared, sink in requests)

    def stop(self) -> None:
        """Cancel everything and wake whoever waits; does not wait itself."""
        self.catalog.close()
        self.transport.stop()

    def close(self) -> None:
        """Cancel everything, free everything."""
        self.stop()
        self.transport.join()


class Face:
    """What both clients are: a core that ends with them."""

    def __init__(self, endpoint: str | None = None, *, timeouts: Timeouts = _TIMEOUTS, retries: int = 2) -> None:
        self._core = Core(endpoint, timeouts, retries)
        # Also at the end of the program: the thread must have gone before the interpreter takes itself apart.
        self._finalizer = weakref.finalize(self, self._core.close)

    def __repr__(self) -> str:
        state = ", closed" if self._core.transport.closed else ""
        return f"<{type(self).__name__} of {self._core.endpoint}{state}>"


class Reading:
    """What both kinds of stream share: one request, its deltas not yet read, and its cancelling."""

    def __init__(self, face: Face, core: Core) -> None:
        self._face = face  # keeps the connection while somebody reads
        self._core = core
        self._deltas: deque[Delta] = deque()
        self._ticket: int | None = None
        self._assembler: Assembler | None = None
        self._prompt_tokens: int | None = None
        self._closed = False

    def __repr__(self) -> str:
        if self._assembler is None:
            return f"<{type(self).__name__}: {'closed' if self._closed else 'not started'}>"
        state = "done" if self._assembler.done else "closed" if self._closed else "open"
        return f"<{type(self).__name__} {self._assembler.id or 'waiting'}: {state}>"

    @property
    def id(self) -> str:
        """The request's id in the broker's log, once tokens came."""
        return "" if self._assembler is None else self._assembler.id

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt; None before it was tokenized."""
        return self._prompt_tokens

    def _launch(self, prepared: Prepared, sink: Sink) -> None:
        self._prompt_tokens = len(prepared.prompt)
        [self._ticket] = self._core.launch([(prepared, sink)])
        # Made while the request is on its way: only who called this reads what comes back.
        self._assembler = Assembler(prepared)

    def _take(self, news: News | None) -> None:
        """What an inbox had; None is put there by `_finish`, to wake a reader in another thread or task."""
        if news is None or self._closed:
            return
        assert self._assembler is not None
        self._deltas.extend(self._assembler.feed(news))
        if self._assembler.done:
            self._cancel()  # a stop string ended it here; otherwise there is nothing left to cancel

    def _next(self) -> Delta | None:
        """The next delta, if there is one."""
        return self._deltas.popleft() if self._deltas and not self._closed else None

    def _over(self) -> bool:
        """Whether there is nothing more to read; raises the error that ended it."""
        if self._assembler is not None and self._assembler.error is not None:
            raise self._assembler.error
        return self._closed or (self._assembler is not None and self._assembler.done)

    def _finish(self, inbox: Box | None) -> None:
        """Stop here: what came stays readable through `result`."""
        if not self._closed:
            self._closed = True
            self._cancel()
            if inbox is not None:
                inbox.put(None)

    def _cancel(self) -> None:
        if self._ticket is not None:
            self._core.transport.drop(self._ticket)
            self._ticket = None

    def _completion(self) -> Completion:
        if self._assembler is None:
            raise RequestCancelledError("The stream was closed before its request was sent; open a new one.")
        if self._closed:
            self._assembler.abandon()
        return self._assembler.completion()

    def __del__(self) -> None:
        # An unfinished stream that nobody holds any more would keep a GPU busy. It may be half made.
        if getattr(self, "_ticket", None) is not None:
            self._cancel()
