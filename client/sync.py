"""`Client`: the library for programs that wait. Several threads may share one; the work is done elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from headrace.client.batch import Batch
from headrace.client.core import Core, Face, Reading
from headrace.client.encoders import AT_ONCE, MaskWish, embed_wishes, joined, result_of, until
from headrace.client.events import News
from headrace.client.inbox import Inbox
from headrace.client.map import Outcome, Window, item_wish
from headrace.client.prepare import Prepared, Wish
from headrace.client.types import Completion, Delta, Embeddings, MapItem, MaskFill
from headrace.client.wish import AnyWish, Ready
from headrace.messages import GetStatus

if TYPE_CHECKING:
    from headrace.card import ModelCard
    from headrace.client.text import Text
    from headrace.sampling import SamplingParams

__all__ = ["Client", "Stream"]


class Client(Face):
    """A connection to a Headrace broker.

    It connects when first used, again whenever the broker went away, and ends with `close` or its `with` block.

        with headrace.Client() as client:
            print(client.generate("Once upon a time", max_tokens=64).text)

    Args:
        endpoint: of the broker; by default $HEADRACE_ENDPOINT, else this user's own.
        timeouts: how long to wait for what.
        retries: how often to try again before the first token; after it a request is resumed, never begun again.
    """

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
        return Stream(self, self._core, self._core.prepare(wish))

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
        inbox: Inbox[tuple[int, News]] = Inbox()
        window = Window(concurrency, ordered=ordered)
        batch = Batch(self._core, iter(prompts), window, partial(item_wish, options=options), inbox)
        return _map_items(_outcomes(self, batch, model, inbox))

    def embed(
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
        return joined(self._read(wishes, model), model)

    def fill_mask(
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
        fills: tuple[tuple[MaskFill, ...], ...] = (self._read([wish], model))[0]
        return fills

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

    def _read(self, wishes: Sequence[AnyWish[Ready]], model: str) -> list[Any]:
        """The results of all wishes, in order."""
        self._core.transport.check()
        inbox: Inbox[tuple[int, News]] = Inbox()
        batch = Batch(self._core, iter(wishes), Window(AT_ONCE, ordered=True), lambda wish: wish, inbox)
        return [result_of(outcome, len(wishes)) for outcome in _outcomes(self, batch, model, inbox)]


class Stream(Reading):
    """An answer while it is made: an iterator of Delta, and a context manager. Closing it cancels the request."""

    def __init__(self, client: Client, core: Core, prepared: Prepared) -> None:
        super().__init__(client, core)
        self._inbox: Inbox[News | None] = Inbox()
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
        while (delta := self._next()) is None:
            if self._over():
                raise StopIteration
            try:
                self._take(self._inbox.get())
            except BaseException:  # Ctrl-C above all: nobody will read on
                self._finish(self._inbox)
                raise
        return delta

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
        self._finish(self._inbox)


def _map_items(outcomes: Generator[Outcome, None, None]) -> Iterator[MapItem]:
    """What a map hands out."""
    with closing(outcomes):
        for outcome in outcomes:
            yield MapItem(outcome.index, outcome.prompt, outcome.result, outcome.error)


def _outcomes(
    client: Client, batch: Batch, model: str, inbox: Inbox[tuple[int, News]]
) -> Generator[Outcome, None, None]:
    """What becomes of each item; `client` keeps the connection while somebody reads."""
    client.text(model)
    try:
        while not batch.over:
            batch.launch(batch.prepare(batch.take()))
            yield from batch.ready()
            for index, news in inbox.get_all(wait=batch.waits):
                batch.settle(index, news)
    finally:
        batch.close()
