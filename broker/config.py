"""Limits and periods of the broker, checked once; the values a person may want to change."""

from __future__ import annotations

from dataclasses import dataclass, fields

from headrace.errors import ConfigError

__all__ = ["BrokerConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerConfig:
    """Settings of one broker; times are seconds.

    Attributes:
        max_queued_requests: streams that may wait for a row of a group, over all models.
        max_queued_tokens: prompt tokens that may wait per model; None means 8 times what its groups' KV caches hold.
        client_share: part of the queue that one connection may fill.
        max_redispatch: how often a stream may lose its group through no proven fault of its own.
        heartbeat: period of the leaders' heartbeats.
        missed_heartbeats: a leader silent for more than this many periods is dead.
        progress_timeout: a busy group whose step counter stands still for longer is hung.
        unavailable_after: how long requests wait for a group of a model that has none at present.
        model_memory: how long a model without groups is remembered.
        client_silence: a client with streams that is silent for longer is gone.
        client_grace: time that a gone client has to come back before its streams are dropped.
        idle_client_timeout: a connection without streams is forgotten after this silence.
        max_clients: connections remembered at once.
        window_bytes: token bytes on the way to one connection that it has not acknowledged.
        stall_timeout: a stream whose tokens stay unacknowledged for longer has a reader that stopped.
        idempotency_window: how long the answer of a finished request is kept.
        max_finished: finished requests kept at most.
        max_finished_bytes: bytes of their answers kept at most.
        quarantine: how long a request that took groups down is refused.
        suspect_steps: a stream whose first step on a dead group was at most this many steps ago is suspect.
        long_probation_steps: steps that a stream which was aboard two dead groups is kept apart.
    """

    max_queued_requests: int = 1024
    max_queued_tokens: int | None = None
    client_share: float = 0.75
    max_redispatch: int = 2
    heartbeat: float = 1.0
    missed_heartbeats: int = 4
    progress_timeout: float = 60.0
    unavailable_after: float = 15.0
    model_memory: float = 600.0
    client_silence: float = 15.0
    client_grace: float = 2.0
    idle_client_timeout: float = 600.0
    max_clients: int = 4096
    window_bytes: int = 1 << 20
    stall_timeout: float = 60.0
    idempotency_window: float = 600.0
    max_finished: int = 4096
    max_finished_bytes: int = 64 << 20
    quarantine: float = 3600.0
    suspect_steps: int = 8
    long_probation_steps: int = 64

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            low = 0 if entry.name in ("max_redispatch", "suspect_steps", "long_probation_steps") else 1e-9
            if value is not None and value < low:
                raise ConfigError(f"The broker's {entry.name} is {value}; give a number above zero.", param=entry.name)
        if self.client_share > 1:
            raise ConfigError("The broker's client_share is above 1; give a part of the queue.", param="client_share")
