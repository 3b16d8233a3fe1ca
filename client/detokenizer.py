"""Turns tokens into text as they come, in whole characters only.

It is `tokenizers.DecodeStream` with what that leaves open: the text held back at the end, tokens that stay undecided
for ever (invalid UTF-8, endless special tokens) and decoders whose later tokens change earlier text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Detokenizer"]

_PRIME = 8  # prompt tokens that may tell whether the first new one begins a word
_UNDECIDED = 32  # a character has at most four bytes, so this many undecided tokens never were one


class Detokenizer:
    """The text of one growing sequence; the joined results are `tokenizer.decode` of all its tokens.

    `prompt` primes the decoder: after a prompt the first token of a sentencepiece model keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._new_stream = DecodeStream
        self._shown: list[int] = _usable_tail(tokenizer, prompt)  # decoded and given out; context for what follows
        self._pending: list[int] = []  # not given out yet
        self._stream = DecodeStream(ids=self._shown, skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The text that this token makes certain."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the library raises bare Exception: the text before changed, which cannot be taken back
            return self._restart(len(self._pending))
        if text is not None:
            self._shown, self._pending = self._pending, []
            return text
        return self._split() if len(self._pending) >= _UNDECIDED else ""

    def flush(self) -> str:
        """What was held back, an unfinished character as U+FFFD. Call it once, at the end."""
        return self._restart(len(self._pending)) if self._pending else ""

    def _split(self) -> str:
        """Give out undecided tokens up to a place that no later token can change."""
        size = len(self._pending)
        whole = self._decode(self._pending)
        for cut in range(size - 1, size // 2, -1):
            if self._decode(self._pending[:cut]) + self._decode(self._pending[cut:]) == whole:
                return self._restart(cut)
        return ""

    def _restart(self, cut: int) -> str:
        """Give out the first `cut` pending tokens and go on with a new stream."""
        before = self._decode(self._shown)
        text = self._decode(self._shown + self._pending[:cut])
        out = text[len(before) :] if text.startswith(before) else self._decode(self._pending[:cut])
        self._shown, self._pending = _usable_tail(self._tokenizer, self._pending[:cut]), self._pending[cut:]
        self._stream = self._new_stream(ids=self._shown, skip_special_tokens=True)
        more = self._stream.step(self._tokenizer, self._pending) if self._pending else None
        if more is None:
            return out
        self._shown, self._pending = self._pending, []
        return out + more

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _usable_tail(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The end of the prompt, if its text is whole: DecodeStream would give out a tail that ends inside a character.

    One that begins inside a character may look so too, hence the longer ones.
    """
    for size in range(_PRIME, _PRIME + 4):
        tail = [int(token) for token in prompt[-size:]]
        if not tokenizer.decode(tail, skip_special_tokens=True).endswith("\N{REPLACEMENT CHARACTER}"):
            return tail
    return []
