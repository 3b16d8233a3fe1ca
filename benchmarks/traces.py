"""What the kernels of a run took: a trace for a viewer, and a table of the longest with their share and, where it is
known what they must read and compute, how fast they did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from headrace.benchmarks.report import amount
from headrace.scripts.terminal import table

__all__ = ["attributed", "kernel_lines", "kind_of", "traced"]

_SHOWN = 16
_KINDS = {
    "attention": re.compile(r"attend|attention|flash|fmha|sdpa|softmax|^_decode$", re.IGNORECASE),
    "matmul": re.compile(
        r"gemm|gemv|skinny|linear|matmul|cutlass|nvjet|splitk|::(add|b|baddb)?mm\b|^(keep|_product|_up|_down)$",
        re.IGNORECASE,
    ),
}


def traced(run: Callable[[Callable[[], None]], int], path: str | None, *, gpu: bool) -> dict[str, Any]:
    """Profile a run from where it says so.

    Args:
        run: is given what it calls at the first step that counts; returns the number of steps from there.
        path: of the trace, in the format of Chrome's viewer and of Perfetto; None for none.
        gpu: whether what counts is what a GPU does.

    Returns:
        `steps`, and `kernels`: name, calls and milliseconds of each, as `attributed` counts them; without a GPU, of
        each operation of torch.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU], acc_events=True)
    steps = run(profiler.start)
    if gpu:
        torch.cuda.synchronize()
    profiler.stop()
    if gpu:
        kernels = attributed(
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()  # type: ignore[no-untyped-call]
            if event.device_type.name == "CUDA"
        )
    else:
        kernels = [
            {"name": event.key, "calls": event.count, "ms": event.self_cpu_time_total / 1e3}
            for event in profiler.key_averages()
        ]
    if path is not None:
        profiler.export_chrome_trace(path)
    return {"steps": steps, "kernels": sorted(kernels, key=lambda kernel: -float(kernel["ms"]))}


def attributed(spans: Iterable[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Calls and milliseconds of kernels, each from the end of the one before, or its own begin if that is later.

    A kernel may be launched while the one before still runs, and waits for it: that time is the other's. So they add up
    to the time in which the device was busy.

    Args:
        spans: name, begin and end of each, in microseconds.
    """
    found: dict[str, dict[str, Any]] = {}
    done = float("-inf")
    for name, begin, end in sorted(spans, key=lambda span: span[2]):
        kernel = found.setdefault(name, {"name": name, "calls": 0, "ms": 0.0})
        kernel["calls"] += 1
        kernel["ms"] += max(0.0, end - max(done, begin)) / 1e3
        done = max(done, end)
    return list(found.values())


def kind_of(kernel: str) -> str:
    """attention, matmul or other, by what kernels and operations of that kind are called."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(kernel)), "other")


def kernel_lines(found: Mapping[str, Any], work: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The longest kernels, then their kinds, per step.

    Args:
        found: what `traced` found.
        work: of a kind, what must be read and computed in one step, where that is known: `bytes` and `flops`, and the
            seconds that the device needs for each, `reading` and `computing`.
    """
    steps, kernels = max(1, found["steps"]), found["kernels"]
    total = sum(kernel["ms"] for kernel in kernels) or 1.0
    lines = _listed(kernels, steps, total)
    heads = [
        "kind",
        "us per step",
        "share",
        "MB per step",
        "GB/s",
        "of the device's",
        "GFLOP per step",
        "TFLOP/s",
        "of the device's",
    ]
    rows = []
    for kind in (*_KINDS, "other"):
        ms = sum(kernel["ms"] for kernel in kernels if kind_of(kernel["name"]) == kind) / steps
        known = work.get(kind, {})
        read = _rates(known.get("bytes"), known.get("reading"), ms / 1e3, (1e6, 1e9))
        done = _rates(known.get("flops"), known.get("computing"), ms / 1e3, (1e9, 1e12))
        rows.append([kind, f"{ms * 1e3:,.1f}", f"{ms * steps / total:.1%}", *read, *done])
    return [*lines, "", *table(heads, rows)]


def _listed(kernels: Sequence[Mapping[str, Any]], steps: int, total: float) -> list[str]:
    heads = ["us per step", "share", "calls per step", "kernel"]
    rows = [
        [
            f"{kernel['ms'] / steps * 1e3:,.1f}",
            f"{kernel['ms'] / total:.1%}",
            f"{kernel['calls'] / steps:.1f}",
            kernel["name"][:80],
        ]
        for kernel in kernels[:_SHOWN]
    ]
    return table(heads, rows)


def _rates(work: float | None, least: float | None, seconds: float, units: tuple[float, float]) -> list[str]:
    """How much there is to do, how much of it was done in a second, and the share of what the device does in one."""
    if not work or least is None or not seconds:
        return ["-"] * 3
    return [amount(work / units[0]), amount(work / seconds / units[1]), f"{least / seconds:.0%}"]
