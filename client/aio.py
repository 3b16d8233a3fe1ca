"""`AsyncClient`: the library for programs with an event loop. It holds nothing of a loop: several may use it in turn.

What could make the loop stand still goes to a thread: questions that the broker must answer first, and long prompts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from headrace.client.batch import Batch
from headrace.client.core import Core, Face, Reading
from headrace.client.encoders import AT_ONCE, MaskWish, embed_wishes, joined, result_of, until
from headrace.client.events import News
from headrace.client.map import Outcome, Window, item_wish
from headrace.client.prepare import Wish
from headrace.client.types import Completion, Delta, Embeddings, MapItem, MaskFill
from headrace.client.wish import AnyWish, Ready
from headrace.errors import HeadraceError
from headrace.messages import GetStatus

if TYPE_CHECKING:
    from headrace.card import ModelCard
    from headrace.client.text import Text
    from headrace.sampling import SamplingParams

__all__ = ["AsyncClient", "AsyncStream"]

T = TypeVar("T")


class AsyncClient(Face):
    """A connection to a Headrace broker, for asyncio; `Client` with `await` in front.

    It connects when first used, again whenever the broker went away, and ends with `close` or its `async with` block.

        async with headrace.AsyncClient() as client:
            async with client.stream("Once upon a time") as stream:
                async for text in stream.text_iter():
                    print(text, end="")

    Args:
        endpoint: of the broker; by default $HEADRACE_ENDPOINT, else this user's own.
        timeouts: how long to wait for what.
        retries: how often to try again before the first token; after it a request is resumed, never begun again.
    """

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what runs and end the connection; harmless when repeated."""
        self._core.stop()  # now, for the threads of the loop's pool may all be waiting for an answer
        await asyncio.to_thread(self._finalizer)

    async def generate(
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
        async with self.stream(
            prompt,
            messages=messages,
            token_ids=token_ids,
            model=model,
            sampling=sampling,
            timeout=timeout,
            **settings,
        ) as stream:
            return await stream.result()

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
    ) -> AsyncStream:
        """The answer while it is made; the request is sent on entering the stream, or when it is first read.

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
        return AsyncStream(self, self._core, wish)

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
    ) -> AsyncIterator[MapItem]:
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
        window = Window(concurrency, ordered=ordered)
        wish_of = partial(item_wish, options=options)
        return _map_items(_outcomes(self, self._core, iter(prompts), window, wish_of, model))

    async def embed(
        self,
        texts: str | Iterable[str | Sequence[int]],
        *,
        model: str = "",
        pooling: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Embeddings:
        """The vector of each text.

        Args:
            texts: one text or many; a text may be given as a list of token ids, too.
            model: name of the model; may be left out when there is only one.
            pooling: mean of all tokens or cls, the first one; by default the model's own.
            normalize: whether vectors have length 1; by default the model's own.
            dimensions: keep so many of the first numbers.
            truncate: read only as much of a long text as the model takes; otherwise such a text is an error.
            timeout: seconds for all of them.

        Raises:
            HeadraceError: of a type that says what went wrong, and with which text.
        """
        wishes = embed_wishes(
            texts,
            model=model,
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            truncate=truncate,
            until=until(timeout),
        )
        return joined(await self._read(wishes, model), model)

    async def fill_mask(
        self, text: str, *, model: str = "", top_k: int = 5, timeout: float | None = None
    ) -> tuple[tuple[MaskFill, ...], ...]:
        """The likeliest words for each mask token of a text, such as [MASK], in the order of the text.

        Args:
            text: with at least one mask token, spelled as the model does.
            model: name of the model; may be left out when there is only one.
            top_k: words for each mask, 1 to 20.
            timeout: seconds for the answer.

        Raises:
            HeadraceError: of a type that says what went wrong.
        """
        wish = MaskWish(source=text, model=model, top_k=top_k, until=until(timeout))
        fills: tuple[tuple[MaskFill, ...], ...] = (await self._read([wish], model))[0]
        return fills

    async def models(self) -> list[ModelCard]:
        """The cards of the models that are served now."""
        return await asyncio.to_thread(self._core.catalog.models)

    async def status(self) -> dict[str, Any]:
        """The broker's report: groups, queues, counters."""
        report: dict[str, Any] = await asyncio.to_thread(self._core.ask, GetStatus())
        return report

    async def text(self, model: str = "") -> Text:
        """The tokenizer and chat template of a model."""
        known = self._core.catalog.known_text(model)
        return known if known is not None else await asyncio.to_thread(self._core.catalog.text, model)

    async def _read(self, wishes: Sequence[AnyWish[Ready]], model: str) -> list[Any]:
        """The results of all wishes, in order."""
        self._core.transport.check()
        window = Window(AT_ONCE, ordered=True)
        async with aclosing(_outcomes(self, self._core, iter(wishes), window, lambda wish: wish, model)) as outcomes:
            return [result_of(outcome, len(wishes)) async for outcome in outcomes]


class AsyncStream(Reading):
    """An answer while it is made: an asynchronous iterator of Delta, and an asynchronous context manager.

    Closing it cancels the request; so does the end of a task that waits for it, or of the last reference to it.
    """

    def __init__(self, client: AsyncClient, core: Core, wish: Wish) -> None:
        super().__init__(client, core)
        self._wish = wish
        self._inbox: _Inbox[News | None] | None = None

    async def __aenter__(self) -> AsyncStream:
        if self._inbox is None:
            await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        inbox = self._inbox or await self._open()
        while (delta := self._next()) is None:
            if self._over():
                raise StopAsyncIteration
            try:
                self._take(await inbox.get())
            except BaseException:  # the task was cancelled, most likely: nobody will read on
                self._finish(inbox)
                raise
        return delta

    async def text_iter(self) -> AsyncIterator[str]:
        """The text only, of the first choice."""
        async for delta in self:
            if delta.text and delta.choice == 0:
                yield delta.text

    async def result(self) -> Completion:
        """Everything: reads on to the end, or up to where the stream was closed.

        Raises:
            HeadraceError: the request failed.
        """
        async for _ in self:
            pass
        return self._completion()

    async def close(self) -> None:
        """Cancel the request if it has not ended; harmless when repeated."""
        self._finish(self._inbox)

    async def _open(self) -> _Inbox[News | None]:
        """Send the request, if the stream was not closed meanwhile."""
        inbox = self._inbox = _Inbox()
        try:
            text = self._core.at_hand([self._wish])
            prepare = self._core.prepare
            prepared = prepare(self._wish, text) if text else await asyncio.to_thread(prepare, self._wish)
            if not self._closed:
                self._launch(prepared, inbox)
        except BaseException:
            self._finish(inbox)
            raise
        return inbox


class _Inbox(Generic[T]):
    """Where news wait for a reader in the event loop that runs now."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T] = asyncio.Queue()

    def put(self, item: T) -> None:
        """Called in the loop."""
        self._queue.put_nowait(item)

    async def get(self) -> T:
        """Wait for the next; the session sees to it that there always is one."""
        return await self._queue.get()

    async def get_all(self, *, wait: bool) -> list[T]:
        """Everything that is there; at least one if it may wait."""
        items = [await self._queue.get()] if wait else []
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        return items


async def _map_items(outcomes: AsyncGenerator[Outcome, None]) -> AsyncIterator[MapItem]:
    """What a map hands out."""
    async with aclosing(outcomes):
        async for outcome in outcomes:
            yield MapItem(outcome.index, outcome.prompt, outcome.result, outcome.error)


async def _outcomes(
    client: AsyncClient,
    core: Core,
    items: Iterator[Any],
    window: Window,
    wish_of: Callable[[Any], AnyWish[Ready]],
    model: str,
) -> AsyncGenerator[Outcome, None]:
    """What becomes of each item; `client` keeps the connection while somebody reads."""
    await client.text(model)
    inbox: _Inbox[tuple[int, News]] = _Inbox()
    batch = Batch(core, items, window, wish_of, inbox)
    try:
        while not batch.over:
            batch.launch(await _prepared(core, batch, batch.take()))
            for item in batch.ready():
                yield item
            for index, news in await inbox.get_all(wait=batch.waits):
                batch.settle(index, news)
    finally:
        batch.close()


async def _prepared(core: Core, batch: Batch, wishes: Mapping[int, AnyWish[Ready]]) -> dict[int, Ready | HeadraceError]:
    text = core.at_hand([*wishes.values()])
    if text or not wishes:
        return batch.prepare(wishes, text)
    return await asyncio.to_thread(batch.prepare, wishes)
