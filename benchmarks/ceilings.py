"""What a device can do at best: bytes read per second and operations of matrix products per second, measured here.

The read rate is that of a sum over more memory than any cache holds, the matrix rate that of a square product large
enough to keep all units busy; the best of several runs each, as both are limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["matmul_rate", "read_rate"]

_RUNS = 12


def read_rate(device: torch.device) -> float:
    """Bytes per second."""
    import torch

    values = torch.ones(2**30 if device.type == "cuda" else 2**29, device=device)  # 4 GiB, or 2: more than caches hold
    return int(values.nbytes) / _best(values.sum, device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second, an addition and a multiplication counted as two."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if dtype is torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        product = partial(torch._scaled_mm, left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return 2 * float(size) ** 3 / _best(partial(product, use_fast_accum=True), device)
    out = torch.empty(size, size, device=device, dtype=dtype)
    return 2 * float(size) ** 3 / _best(lambda: torch.mm(left, right, out=out), device)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest run; on a GPU by its own clock."""
    import torch

    run()
    times = []
    for _ in range(_RUNS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        else:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return float(min(times))
