"""How a kernel begins while the one before it ends (programmatic dependent launch, from sm_90 on).

A kernel that is launched with `chained(device)` may start when all programs of the one before it have called
`let_next_begin`. Until `wait_for_earlier` it may write nothing at all, and read only what was there before the last
launch that overlaps with nothing: weights, and of a step all that was written before its tokens were embedded, which is
such a launch: lengths, tables of blocks, and keys and values of earlier steps. What comes after that is not done until
then. As every program of every kernel waits, even one that has nothing to do, the end of one is also the end of all
before it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["chained", "let_next_begin", "wait_for_earlier"]

_FIRST_CAPABILITY = (9, 0)


@cache
def chained(device: torch.device) -> dict[str, Any]:
    """Settings of a launch: `CHAINED` for the kernel, which may overlap with the one before it if that is true."""
    chain = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
    return {"CHAINED": True, "launch_pdl": True} if chain else {"CHAINED": False}


@triton.jit
def let_next_begin(CHAINED: tl.constexpr):
    """Let the programs of the next kernel start as soon as there is room for them."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_earlier(CHAINED: tl.constexpr):
    """Wait until all that was launched before is done, and to be seen."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
