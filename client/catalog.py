"""What a client knows of the served models: their cards, asked for anew every few seconds, and their texts, kept.

It blocks while the broker answers; the asynchronous face calls it in a worker thread when it has to ask.
"""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable
from typing import Any

from headrace.card import CHAT_TEMPLATE, TOKENIZER, ModelCard
from headrace.client.blobs import BlobCache, check_hash
from headrace.client.text import Text
from headrace.errors import ModelFilesError, ProtocolError, UnavailableError, UnknownModelError
from headrace.messages import Blob, Describe, GetBlob, Message

__all__ = ["Catalog"]

_FRESH = 5.0  # seconds a card is trusted: a model replaced under its name may tokenize differently
_MAX_BLOB = 256 << 20
_MAX_TEXTS = 8


class Catalog:
    """Cards and texts.

    Args:
        ask: sends a question to the broker and returns its answer, or raises its error.
        retries: how often to ask again for a model that no group serves yet.
    """

    def __init__(self, ask: Callable[[Message], Any], retries: int, blobs: BlobCache | None = None) -> None:
        self._ask = ask
        self._retries = retries
        self._blobs = blobs or BlobCache()
        self._cards: dict[str, ModelCard] = {}
        self._asked_at: float | None = None
        self._texts: dict[tuple[str, str], Text] = {}
        self._lock = threading.Lock()  # a tokenizer is loaded once, not once per waiting thread
        self._closed = threading.Event()

    def close(self) -> None:
        """Wake whoever waits."""
        self._closed.set()

    def models(self) -> list[ModelCard]:
        """The cards of all models that are served now."""
        cards: tuple[ModelCard, ...] = self._ask(Describe())
        self._cards = {card.name: card for card in cards}
        self._asked_at = time.monotonic()
        return list(cards)

    def known_text(self, model: str) -> Text | None:
        """The text of a model, if that needs no question."""
        if self._asked_at is None or time.monotonic() - self._asked_at > _FRESH:
            return None
        card = self._pick(model)
        return None if card is None else self._texts.get((card.name, card.fingerprint))

    def text(self, model: str) -> Text:
        """The text of a model; the empty name means the only one.

        Raises:
            UnknownModelError: none of that name is served; names the nearest.
            UnavailableError: no model is served at all.
        """
        if (known := self.known_text(model)) is not None:
            return known
        # Every thread asks for itself, so that none waits for another's timeout; the session asks the broker but once.
        card = self._card(model)
        key = (card.name, card.fingerprint)
        with self._lock:
            if key not in self._texts:
                while len(self._texts) >= _MAX_TEXTS:
                    del self._texts[next(iter(self._texts))]
                self._texts[key] = self._load(card)
            return self._texts[key]

    def _card(self, model: str) -> ModelCard:
        for attempt in range(self._retries + 1):
            if attempt:
                self._closed.wait(0.5 * 2**attempt)
            cards = self.models()
            if (card := self._pick(model)) is not None:
                return card
            if cards:
                raise _unknown(model, cards)
        raise UnavailableError("No worker group is ready yet; see `headrace status`, and try again.", retry_after=2.0)

    def _pick(self, model: str) -> ModelCard | None:
        if not model and len(self._cards) == 1:
            return next(iter(self._cards.values()))
        return self._cards.get(model)

    def _load(self, card: ModelCard) -> Text:
        if TOKENIZER not in card.blobs:
            raise ModelFilesError(
                f"The model {card.name} has no {TOKENIZER}, so its tokens make no text; add the file to its folder."
            )
        names = [name for name in (TOKENIZER, CHAT_TEMPLATE) if name in card.blobs]
        return Text(card, {name: self._blob(card.blobs[name]) for name in names})

    def _blob(self, digest: str) -> bytes:
        check_hash(digest)
        if (kept := self._blobs.get(digest)) is not None:
            return kept
        content = bytearray()
        while True:
            part: Blob = self._ask(GetBlob(hash=digest, offset=len(content)))
            content += part.data
            if part.total > _MAX_BLOB or len(content) > part.total or (not part.data and len(content) < part.total):
                raise ProtocolError(f"The broker sent a file of {part.total:,} bytes in parts that do not add up.")
            if len(content) == part.total:
                break
        self._blobs.put(digest, bytes(content))
        return bytes(content)


def _unknown(model: str, cards: list[ModelCard]) -> UnknownModelError:
    names = sorted(card.name for card in cards)
    served = ", ".join(names[:8])
    if not model:
        return UnknownModelError(f"Several models are served ({served}); name one of them.", param="model")
    near = difflib.get_close_matches(model, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"served now: {served}."
    return UnknownModelError(f"The broker serves no model named {model[:120]!r}; {hint}", param="model")
