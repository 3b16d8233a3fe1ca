"""How long work reports where it is: a callable that is given words for people, bytes done and bytes in all.

Drawing is the caller's business. A call with no total is a remark, or a phase whose length nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int | None], None]


def silent(phase: str, done: int, total: int | None) -> None:
    """Progress for callers that want none."""
