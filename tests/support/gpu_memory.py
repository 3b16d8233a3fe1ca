"""What stays on a GPU behind what was made there and let go of."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

__all__ = ["check_that_nothing_stays"]


def check_that_nothing_stays(use: Callable[[], None]) -> None:
    """Call it twice: the first time sets up what stays, such as the workspaces of cuBLAS."""
    held = []
    for _ in range(2):
        use()
        gc.collect()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    (allocated, reserved), after = held
    assert after[0] - allocated < 1 << 20
    assert after[1] - reserved <= 4 << 20
