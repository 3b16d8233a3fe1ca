"""Counters, and the report that answers GetStatus: plain maps for people and for metrics.

broker, version, uptime_seconds
models    [{name, ready_groups, queue_depth, queue_tokens, running}]
groups    [{name, model, state, running, max_num_seqs, kv_tokens, load, heartbeat_age_seconds, step, step_age_seconds}]
queue     {depth, tokens, parked}
clients   connections; requests {live, finished}
counters  {stem_total: number, or {label value: number}}, the stems of the metrics
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from headrace.broker.groups import Group, Registry

__all__ = ["Counters", "describe_group", "describe_models"]


class Counters:
    """What happened since the start."""

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.tokens = 0
        self.resumed_tokens = 0
        self.stale_frames = 0
        self.quarantined = 0
        self.stream_stalls = 0
        self.finished: Counter[str] = Counter()  # by reason
        self.rejected: Counter[str] = Counter()  # by error code
        self.failed: Counter[str] = Counter()  # by error code, after they were accepted
        self.cancelled: Counter[str] = Counter()  # by whom
        self.redispatch: Counter[str] = Counter()  # by reason
        self.malformed: Counter[str] = Counter()  # by face

    def report(self) -> dict[str, Any]:
        """All counters as plain values, with the stems of the metrics."""
        return {
            f"{name}_total": dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()
        }


def describe_group(group: Group, now: float) -> dict[str, Any]:
    """One group for people."""
    return {
        "name": group.name,
        "model": group.card.name,
        "state": group.state.value,
        "running": len(group.streams),
        "max_num_seqs": group.max_num_seqs,
        "kv_tokens": group.kv_tokens,
        "load": dict(group.load),
        "heartbeat_age_seconds": round(now - group.heard_at, 3),
        "step": group.step,
        "step_age_seconds": round(now - group.step_at, 3),
    }


def describe_models(registry: Registry) -> list[dict[str, Any]]:
    """All models for people."""
    return [
        {
            "name": name,
            "ready_groups": len(model.ready),
            "queue_depth": len(model.queue),
            "queue_tokens": model.queue.tokens,
            "running": sum(len(group.streams) for group in model.groups),
        }
        for name, model in registry.models.items()
    ]
