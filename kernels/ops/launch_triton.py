"""How kernels follow each other: one may start while the one before it ends, and waits before it touches memory.

On GPUs that can (programmatic dependent launch, from Hopper on) the blocks of the next kernel come onto processors that
have become idle, so that most of what a launch costs is over when their turn comes. A kernel that is launched with
`overlapping()` calls `wait_for_others` first of all; only weights of the model may be read before.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

__all__ = ["overlapping", "wait_for_others"]


def overlapping() -> dict[str, bool]:
    """Options of a launch on the current device: the constant OVERLAP of the kernel, and what makes it true."""
    if triton.knobs.runtime.interpret or not _can_overlap(torch.cuda.current_device()):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@cache
def _can_overlap(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_others(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait until all that the one before wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
