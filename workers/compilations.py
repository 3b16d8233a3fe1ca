"""Counts the kernels that Triton compiles in this process, or loads from its cache: both make a step wait."""

from __future__ import annotations

import logging
import sys
from typing import Any

__all__ = ["compilations"]

logger = logging.getLogger(__name__)

_count = 0
_watched: Any = None  # the hook, once it is there


def compilations() -> int:
    """Kernels compiled or loaded since this was first called; 0 where nobody imported Triton.

    What comes after the first call is also logged, on the level of debugging: a group says READY once it has seen all.
    """
    _watch()
    return _count


def _watch() -> None:
    global _watched
    if _watched is not None or "triton" not in sys.modules:
        return
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook

    def compiled(*args: Any, **kwargs: Any) -> Any:
        global _count
        _count += 1
        logger.debug("compiled or loaded %s", kwargs.get("repr"))
        return before(*args, **kwargs) if before is not None else None

    knobs.runtime.jit_post_compile_hook = _watched = compiled
