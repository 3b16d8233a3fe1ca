"""Keeps control tokens out of what users write: `<|im_end|>` in a message must be seven letters of text, not a token.

How. The rendered chat is tokenized as one text, exactly as the model was trained, so nothing can be done after the
template ran; and what the template does to a message (strip, split, join, JSON) is not ours to guess, so nothing may be
replaced by placeholders before. Instead an invisible *mark*, a character that occurs nowhere else, is put
 - inside every control text that a string of the caller contains, after its first character;
 - at the end (or beginning) of a string that ends (begins) with part of one, which a neighbour might complete.
After rendering, the text is cut at the marks and the pieces are tokenized one by one: no piece contains a control text
that a caller wrote or helped to form, and the marks are gone. Without any such string there are no marks, and the text
is tokenized in one go. Names of roles are left alone, because templates compare them; they may hold letters only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from headrace.errors import InvalidRequestError

__all__ = ["Markers"]

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NAMES = ("role", "type")  # keys whose values templates compare, so a plain name there stays as it is
_FIRST_MARK = 0xF0000  # private use: no text has a reason to hold it


class Markers:
    """Finds and breaks control texts in the values a caller gave.

    Args:
        strict: texts that end or structure a conversation; broken everywhere.
        others: texts of further tokens that the template writes; an assistant's message may hold them, nobody else's.
        normalize: what the tokenizer does to text before it looks for control texts, if anything.
    """

    def __init__(
        self, strict: Iterable[str], others: Iterable[str] = (), *, normalize: Callable[[str], str] | None = None
    ) -> None:
        strict = {text for text in strict if len(text) > 1}
        self._assistant = _Breaker(strict, normalize)
        self._anybody = _Breaker(strict | {text for text in others if len(text) > 1}, normalize)

    def mark(self, messages: list[dict[str, Any]], rest: Any) -> tuple[list[dict[str, Any]], Any, str]:
        """Copies of the messages and the other values with marks in them, and the mark; it is empty if none was needed.

        Raises:
            InvalidRequestError: a role is not a name, or the values are nested too deeply.
        """
        check_roles(messages)
        try:
            strings = [*_strings(messages), *_strings(rest)]
            if not any(self._anybody.finds(text) for text in strings):
                return messages, rest, ""
            mark = next(chr(code) for code in range(_FIRST_MARK, 0xFFFFE) if not any(chr(code) in s for s in strings))
            marked = [
                _mapped(message, (self._assistant if message["role"] == "assistant" else self._anybody).breaking(mark))
                for message in messages
            ]
            return marked, _mapped(rest, self._anybody.breaking(mark)), mark
        except RecursionError:
            raise InvalidRequestError("The messages are nested too deeply.", param="messages") from None


def check_roles(messages: list[dict[str, Any]]) -> None:
    """Refuse a role that is not a plain name.

    Raises:
        InvalidRequestError: there is one.
    """
    for number, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise InvalidRequestError(
                f"messages[{number}] has the role {role!r:.60}; give a name such as user, assistant or system.",
                param="messages",
            )


class _Breaker:
    """Breaks one set of control texts."""

    def __init__(self, texts: set[str], normalize: Callable[[str], str] | None) -> None:
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if texts else None
        self._normalize = normalize
        self._longest = max(map(len, texts), default=0)
        self._heads = {text[:size] for text in texts for size in range(1, len(text))}
        self._tails = {text[size:] for text in texts for size in range(1, len(text))}

    def finds(self, text: str) -> bool:
        """Whether the text needs a mark."""
        return self._whole(text) or self._hidden(text) or self._at_end(text) or self._at_start(text)

    def breaking(self, mark: str) -> Callable[[str], str]:
        """A function that puts the marks into a text."""

        def put(text: str) -> str:
            if self._hidden(text):
                return mark + mark.join(text) + mark
            end, start = self._at_end(text), self._at_start(text)
            # Breaking one control text can leave another that overlapped it.
            while self._whole(text):
                assert self._pattern is not None
                text = self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)
            return (mark if start else "") + text + (mark if end else "")

        return put

    def _whole(self, text: str) -> bool:
        return self._pattern is not None and self._pattern.search(text) is not None

    def _hidden(self, text: str) -> bool:
        """Whether a control text appears only once the tokenizer has normalized the text, such as in wide letters."""
        return self._normalize is not None and not self._whole(text) and self._whole(self._normalize(text))

    def _at_end(self, text: str) -> bool:
        return any(text[-size:] in self._heads for size in range(1, min(self._longest, len(text) + 1)))

    def _at_start(self, text: str) -> bool:
        return any(text[:size] in self._tails for size in range(1, min(self._longest, len(text) + 1)))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield key
            if not _is_name(key, item):
                yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _key(key, change): item if _is_name(key, item) else _mapped(item, change) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def _is_name(key: Any, value: Any) -> bool:
    return key in _NAMES and isinstance(value, str) and _ROLE.fullmatch(value) is not None


def _key(key: Any, change: Callable[[str], str]) -> Any:
    # Templates look fields up by name, and a name never holds a control text; a tool's parameter may be named anything.
    return key if not isinstance(key, str) or key.isidentifier() else change(key)
