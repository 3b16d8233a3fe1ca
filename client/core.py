"""What `Client` and `AsyncClient` share: everything but the way of waiting."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from random import Random
from typing import Any

from headrace.addresses import client_endpoint
from headrace.client.assemble import Assembler
from headrace.client.catalog import Catalog
from headrace.client.events import Answer, Failed, News
from headrace.client.prepare import Prepared, Wish, prepare
from headrace.client.session import Session
from headrace.client.text import Text
from headrace.client.transport import Sink, Transport
from headrace.client.types import Completion, Delta, Timeouts
from headrace.errors import InvalidRequestError
from headrace.messages import Message

__all__ = ["Core", "Inbox", "Reading"]


class Inbox:
    """News for whoever waits in a thread."""

    loop = None

    def __init__(self) -> None:
        self._queue: SimpleQueue[News] = SimpleQueue()

    def put(self, news: News) -> None:
        """Called by the transport."""
        self._queue.put(news)

    def get(self) -> News:
        """Wait for the next; the session sees to it that there always is one."""
        return self._queue.get()


class Core:
    """One client's transport, session and catalog."""

    def __init__(self, endpoint: str | None, timeouts: Timeouts, retries: int) -> None:
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InvalidRequestError(f"retries is {retries!r}; give a whole number from 0.", param="retries")
        self.endpoint = endpoint or client_endpoint()
        self.timeouts = timeouts
        session = Session(
            self.endpoint, timeouts=timeouts, retries=retries, random=Random(os.urandom(32)), name=f"pid {os.getpid()}"
        )
        self.transport = Transport(self.endpoint, session)
        self.catalog = Catalog(self.ask, retries)

    def ask(self, question: Message) -> Any:
        """A question and its answer, waiting for it.

        Raises:
            HeadraceError: there is no broker, or it refused.
        """
        inbox = Inbox()
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

    def prepare(self, wish: Wish, text: Text) -> Prepared:
        """The request that a wish makes of a model."""
        return prepare(wish, text, self.timeouts.total)

    def launch(self, requests: Sequence[tuple[Prepared, Sink]]) -> list[int]:
        """Submit requests together."""
        return self.transport.start((prepared.spec, sink) for prepared, sink in requests)

    def close(self) -> None:
        """Cancel everything, free everything."""
        self.catalog.close()
        self.transport.close()


class Reading:
    """What both kinds of stream share: one request, its deltas not yet read, and its cancelling."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._deltas: deque[Delta] = deque()
        self._ticket: int | None = None
        self._assembler: Assembler | None = None
        self._closed = False

    def __repr__(self) -> str:
        if self._assembler is None:
            return f"<{type(self).__name__}: not started>"
        state = "done" if self._assembler.done else "closed" if self._closed else "open"
        return f"<{type(self).__name__} {self._assembler.id or 'waiting'}: {state}>"

    @property
    def id(self) -> str:
        """The request's id in the broker's log, once tokens came."""
        return "" if self._assembler is None else self._assembler.id

    def _launch(self, prepared: Prepared, sink: Sink) -> None:
        self._assembler = Assembler(prepared)
        [self._ticket] = self._core.launch([(prepared, sink)])

    def _take(self, news: News) -> None:
        assert self._assembler is not None
        self._deltas.extend(self._assembler.feed(news))
        if self._assembler.done:
            self._cancel()  # a stop string ended it here; otherwise there is nothing left to cancel

    def _over(self) -> bool:
        """Whether there is nothing more to read; raises the error that ended it."""
        if self._closed:
            return True
        if self._assembler is None or not self._assembler.done:
            return False
        if self._assembler.error is not None:
            raise self._assembler.error
        return True

    def _finish(self) -> None:
        """Stop here: what came stays readable through `result`."""
        if not self._closed:
            self._closed = True
            self._cancel()
            self._deltas.clear()
            if self._assembler is not None:
                self._assembler.abandon()

    def _cancel(self) -> None:
        if self._ticket is not None:
            self._core.transport.drop(self._ticket)
            self._ticket = None

    def _completion(self) -> Completion:
        assert self._assembler is not None
        return self._assembler.completion()

    def __del__(self) -> None:
        # An unfinished stream that nobody holds any more would keep a GPU busy. It may be half made.
        if getattr(self, "_ticket", None) is not None:
            self._cancel()
