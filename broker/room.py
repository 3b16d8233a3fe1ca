"""The bounds of the queues: how much may wait, in all, per model and per connection; and what may not run at all."""

from __future__ import annotations

from headrace.broker.admission import quarantine_key
from headrace.broker.config import BrokerConfig
from headrace.broker.groups import Model, Registry
from headrace.broker.refusals import unavailable
from headrace.broker.replays import Quarantine
from headrace.broker.requests import Job
from headrace.errors import OverloadedError, WorkerCrashedError

__all__ = ["Room"]

_KV_FACTOR = 8  # prompt tokens that may wait, in KV caches
_MAX_WAIT = 30.0


class Room:
    """Says whether a request may join a queue. Streams that a client brings back have as much room again."""

    def __init__(self, config: BrokerConfig, registry: Registry, quarantine: Quarantine) -> None:
        self._config = config
        self._registry = registry
        self._quarantine = quarantine

    def check(self, job: Job, n: int, model: Model, *, resumed: bool, now: float) -> None:
        """Refuse what would overfill the queues, or should not run at all.

        Raises:
            WorkerCrashedError: its content took groups down lately.
            UnavailableError: the model has had no group for too long.
            OverloadedError: the queue is full, or this connection's part of it.
        """
        if self._quarantine.holds(quarantine_key(job.digest, job.max_tokens), now):
            raise WorkerCrashedError("This request took its worker group down before; it is refused. Do not repeat it.")
        waited = 0.0 if model.lost_at is None else now - model.lost_at
        if waited > self._config.unavailable_after and not model.groups:
            raise unavailable(model.card.name)
        if not self.is_enough(job, n, model, resumed=resumed):
            rows = sum(group.max_num_seqs for group in model.groups) or 1
            raise OverloadedError(
                f"{self._registry.queued} requests wait already; try again later.",
                retry_after=min(_MAX_WAIT, 1.0 + 0.5 * self._registry.queued / rows),
            )

    def is_enough(self, job: Job, n: int, model: Model, *, resumed: bool) -> bool:
        """Whether n more streams of this job fit."""
        factor = 2 if resumed else 1
        limit = self._config.max_queued_requests * factor
        share = limit * self._config.client_share
        if self._registry.queued + n > limit or model.queue.waiting_for(job.owner) + n > max(n, share):
            return False
        tokens = model.queue.tokens + n * job.prompt_tokens
        return not model.queue or tokens <= self._token_limit(model) * factor

    def _token_limit(self, model: Model) -> int:
        if self._config.max_queued_tokens is not None:
            return self._config.max_queued_tokens
        return _KV_FACTOR * (sum(group.kv_tokens for group in model.groups) or model.card.max_model_len)
