"""Where the time of a start went, as a table for people."""

from __future__ import annotations

from headrace.scripts.progress import size
from headrace.workers.start_report import Phase, StartReport

__all__ = ["start_table"]

_NAMES = {
    "imports": "python and imports",
    "model": "config and device",
    "weights": "reading weights",
    "compile": "compiling kernels",
    "memory": "sizing the cache",
    "kernels": "warming up",
    "graphs": "CUDA graphs",
    "broker": "connecting",
}


def start_table(report: StartReport) -> list[str]:
    """Lines of at most 60 letters: phases, the seconds of each, what was counted; and the sum."""
    rows = [(_NAMES.get(phase.name, phase.name), phase.seconds, _counted(phase)) for phase in report.phases]
    rows.append(("ready after", report.seconds, ""))
    return [f"  {name:<20}{seconds:>7.1f} s  {counted}".rstrip() for name, seconds, counted in rows]


def _counted(phase: Phase) -> str:
    if not phase.amount:
        return ""
    match phase.name:
        case "weights":
            return size(phase.amount)
        case "memory":
            return f"{phase.amount:,} tokens"
        case "compile":
            return f"{phase.amount:,} by {phase.threads:,} threads"
    return f"{phase.amount:,}"
