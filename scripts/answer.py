"""One answer, streamed to the terminal and timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.client import Client
    from headrace.scripts.terminal import Terminal

__all__ = ["Answer", "stream_answer"]


_ENDS = {"length": "ended at the limit of tokens", "cancelled": "stopped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came, and how fast.

    Attributes:
        text: all of it.
        tokens: how many made the text.
        first_token: seconds from the request to the first token; None if there was none.
        rate: tokens a second after the first; None for fewer than two.
        finish_reason: stop, length or cancelled.
    """

    text: str
    tokens: int
    first_token: float | None
    rate: float | None
    finish_reason: str

    def figures(self) -> str:
        """The line below an answer."""
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.rate is not None:
            parts.append(f"{self.rate:.1f} tok/s")
        if self.first_token is not None:
            parts.append(f"first token {self.first_token:.2f} s")
        if self.finish_reason != "stop":
            parts.append(_ENDS.get(self.finish_reason, self.finish_reason))
        return ", ".join(parts)


def stream_answer(
    client: Client,
    terminal: Terminal,
    *,
    messages: Sequence[dict[str, str]] | None = None,
    token_ids: Sequence[int] | None = None,
    model: str = "",
    settings: dict[str, Any] | None = None,
) -> Answer:
    """Stream an answer to messages, or what follows tokens. Ctrl-C ends it, and what came is returned.

    Raises:
        HeadraceError: it failed; what came until then is on the terminal.
    """
    started = time.monotonic()
    first = last = None
    tokens, pieces, reason = 0, [], "cancelled"
    stream = client.stream(messages=messages, token_ids=token_ids, model=model, **(settings or {}))
    with stream:
        try:
            for delta in stream:
                if delta.token_ids:
                    last = time.monotonic()
                    first = first or last
                    tokens += len(delta.token_ids)
                pieces.append(delta.text)
                terminal.stream(delta.text)
                reason = delta.finish_reason or reason
        except KeyboardInterrupt:
            pass  # leaving the block cancels the request
        finally:
            terminal.end_stream()
    spread = (last - first) if first is not None and last is not None else 0.0
    return Answer(
        text="".join(pieces),
        tokens=tokens,
        first_token=None if first is None else first - started,
        rate=(tokens - 1) / spread if spread > 0 and tokens > 1 else None,
        finish_reason=reason,
    )
