"""`Client`: the library for programs that wait. Several threads may share one; the work is done elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from headrace.card import ModelCard
from headrace.client.assemble import Assembler
from headrace.client.core import Core, Inbox, Reading
from headrace.client.events import News
from headrace.client.map import Window, item_wish
from headrace.client.prepare import Prepared, Wish
from headrace.client.text import Text
from headrace.client.types import Completion, Delta, MapItem, Timeouts
from headrace.errors import HeadraceError, InvalidRequestError
from headrace.messages import GetStatus
from headrace.sampling import SamplingParams

__all__ = ["Client", "Stream"]

_TIMEOUTS = Timeouts()


class Client:
    """A connection to a Headrace broker.

    It connects when first used, again whenever the broker went away, and ends with `close` or its `with` block.

        with headrace.Client() as client:
            print(client.generate("Once upon a time", max_tokens=64).text)

    Args:
        endpoint: of the broker; by default $HEADRACE_ENDPOINT, else this user's own.
        timeouts: how long to wait for what.
        retries: how often to try again before the first token; after it a request is resumed, never begun again.
    """

    def __init__(self, endpoint: str | None = None, *, timeouts: Timeouts = _TIMEOUTS, retries: int = 2) -> None:
        self._core = Core(endpoint, timeouts, retries)
        # Also at the end of the program: the thread must have gone before the interpreter takes itself apart.
        self._finalizer = weakref.finalize(self, self._core.close)

    def __repr__(self) -> str:
        return f"<Client of {self._core.endpoint}{'' if self._finalizer.alive else ', closed'}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and end the connection; harmless when repeated."""
        self._finalizer()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> Completion:
        """The whole answer; the arguments are those of `stream`.

        Raises:
            HeadraceError: of a type that says what went wrong.
            TypeError: an unknown setting; names the nearest.
        """
        with self.stream(
            prompt,
            messages=messages,
            token_ids=token_ids,
            model=model,
            sampling=sampling,
            timeout=timeout,
            **settings,
        ) as stream:
            return stream.result()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> Stream:
        """The answer while it is made.

        Args:
            prompt: text to continue as it is.
            messages: a chat, `[{"role": "user", "content": "..."}]`, rendered by the model's template.
            token_ids: a prompt already in tokens.
            model: name of the model; may be left out when there is only one.
            sampling: all settings at once, instead of the model's own.
            timeout: seconds for the whole answer.
            settings: fields of SamplingParams; those not given are the model's own.

        Raises:
            HeadraceError: of a type that says what went wrong.
            TypeError: an unknown setting; names the nearest.
        """
        wish = Wish(
            prompt=prompt,
            messages=messages,
            token_ids=token_ids,
            model=model,
            sampling=sampling,
            timeout=timeout,
            settings=settings,
        )
        self._core.transport.check()
        return Stream(self, self._core, self._core.prepare(wish, self._core.catalog.text(model)))

    def map(
        self,
        prompts: Iterable[Any],
        *,
        concurrency: int = 64,
        ordered: bool = True,
        model: str = "",
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> Iterator[MapItem]:
        """One result per prompt, in order or as they come; a prompt that fails has its error in its item.

        The prompts (strings, lists of messages, lists of token ids) may come from an endless iterator: it is read only
        as far as `concurrency` asks. The other arguments are those of `stream`, `timeout` being that of each answer.

        Raises:
            HeadraceError: before the first result: no broker, or no such model.
            TypeError: an unknown setting; names the nearest.
        """
        options = {"model": model, "sampling": sampling, "timeout": timeout, "settings": settings}
        item_wish("", options)  # says what is wrong with the options now, not at the first result
        self._core.transport.check()
        return _results(self, self._core, iter(prompts), Window(concurrency, ordered=ordered), options)

    def models(self) -> list[ModelCard]:
        """The cards of the models that are served now."""
        return self._core.catalog.models()

    def status(self) -> dict[str, Any]:
        """The broker's report: groups, queues, counters."""
        report: dict[str, Any] = self._core.ask(GetStatus())
        return report

    def text(self, model: str = "") -> Text:
        """The tokenizer and chat template of a model."""
        return self._core.catalog.text(model)


class Stream(Reading):
    """An answer while it is made: an iterator of Delta, and a context manager. Closing it cancels the request."""

    def __init__(self, client: Client, core: Core, prepared: Prepared) -> None:
        super().__init__(core)
        self._client = client  # keeps the connection while somebody reads
        self._inbox = Inbox()
        self._launch(prepared, self._inbox)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        try:
            while not self._deltas:
                if self._over():
                    raise StopIteration
                self._take(self._inbox.get())
        except StopIteration:
            raise
        except BaseException:  # Ctrl-C above all: nobody will read on
            self._cancel()
            raise
        return self._deltas.popleft()

    def text_iter(self) -> Iterator[str]:
        """The text only, of the first choice."""
        for delta in self:
            if delta.text and delta.choice == 0:
                yield delta.text

    def result(self) -> Completion:
        """Everything: reads on to the end, or up to where the stream was closed.

        Raises:
            HeadraceError: the request failed.
        """
        for _ in self:
            pass
        return self._completion()

    def close(self) -> None:
        """Cancel the request if it has not ended; harmless when repeated."""
        self._finish()


class _Tagged:
    """A sink that many items share."""

    loop = None

    def __init__(self, index: int, queue: SimpleQueue[tuple[int, News]]) -> None:
        self._index = index
        self._queue = queue

    def put(self, news: News) -> None:
        self._queue.put((self._index, news))


def _results(
    client: Client, core: Core, prompts: Iterator[Any], window: Window, options: Mapping[str, Any]
) -> Iterator[MapItem]:
    core.catalog.text(str(options["model"]))
    queue: SimpleQueue[tuple[int, News]] = SimpleQueue()
    running: dict[int, tuple[int, Assembler]] = {}  # by index: ticket and what came
    more = True
    try:
        while True:
            if more:
                more = _refill(core, prompts, window, options, queue, running)
            yield from window.ready()
            if window.empty:
                if not more:
                    return
                continue
            if running and (not more or not window.room):
                for index, news in _waiting(queue):
                    _settle(core, window, running, index, news)
    finally:
        for ticket, _ in running.values():
            core.transport.drop(ticket)
        del client


def _refill(
    core: Core,
    prompts: Iterator[Any],
    window: Window,
    options: Mapping[str, Any],
    queue: SimpleQueue[tuple[int, News]],
    running: dict[int, tuple[int, Assembler]],
) -> bool:
    """Start as many items as there is room for, in one message; False once there are no more prompts."""
    batch: list[tuple[int, Prepared]] = []
    more = True
    for _ in range(window.room):
        try:
            prompt = next(prompts)
        except StopIteration:
            more = False
            break
        index = window.start(prompt)
        try:
            batch.append((index, core.prepare(item_wish(prompt, options), core.catalog.text(str(options["model"])))))
        except HeadraceError as error:
            window.finish(index, error)
        except (TypeError, ValueError, OverflowError) as error:
            window.finish(index, InvalidRequestError(f"The item cannot be used: {error}.", param="prompts"))
    tickets = core.launch([(prepared, _Tagged(index, queue)) for index, prepared in batch]) if batch else []
    running.update(
        {index: (ticket, Assembler(prepared)) for (index, prepared), ticket in zip(batch, tickets, strict=True)}
    )
    return more


def _waiting(queue: SimpleQueue[tuple[int, News]]) -> Iterator[tuple[int, News]]:
    """What came, at least one."""
    yield queue.get()
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


def _settle(core: Core, window: Window, running: dict[int, tuple[int, Assembler]], index: int, news: News) -> None:
    if index not in running:
        return  # a stop string ended it already
    ticket, assembler = running[index]
    assembler.feed(news)
    if assembler.done:
        del running[index]
        core.transport.drop(ticket)
        window.finish(index, assembler.error or assembler.completion())
