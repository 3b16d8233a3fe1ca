"""Requests that came before their model was announced: kept for a while, within bounds. Decides nothing else.

They are not accepted yet, so their client may send them again; the newest copy counts, with the time left to it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import NamedTuple

from headrace.broker.admission import digest
from headrace.broker.config import BrokerConfig
from headrace.broker.refusals import too_late, unavailable
from headrace.errors import ConflictError, HeadraceError, OverloadedError
from headrace.messages import Request
from headrace.sampling import SamplingParams

__all__ = ["Parked", "WaitingRoom"]

_MAX_BYTES = 64 << 20  # of prompts and outputs; without a model there is no count of tokens to go by


class Parked(NamedTuple):
    """A request and whose it is; `since` when it waits, until `deadline` at most."""

    peer: bytes
    request: Request
    digest: bytes
    since: float
    deadline: float | None


class WaitingRoom:
    """Requests by id, oldest first."""

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._parked: dict[bytes, Parked] = {}
        self._share: Counter[bytes] = Counter()  # requests by peer
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._parked)

    def park(self, peer: bytes, request: Request, now: float) -> None:
        """Keep a request, or the newer copy of one.

        Raises:
            InvalidRequestError: a sampling value is out of range, whatever the model.
            ConflictError: the id is taken by another request.
            OverloadedError: the room is full.
        """
        sampling = SamplingParams.from_wire(request.sampling)
        body = digest(request, request.model, sampling)
        known = self._parked.get(request.id)
        if known is not None and known.digest != body:
            raise ConflictError("The id is taken by another request; choose 16 new random bytes.")
        if known is None:
            self._check_room(peer, request)
        else:
            self._uncount(known)
        deadline = None if request.budget_ms is None else now + request.budget_ms / 1000
        since = now if known is None else known.since
        request = dataclasses.replace(request, sampling=sampling.to_wire())
        self._parked[request.id] = Parked(peer, request, body, since, deadline)  # a newer copy keeps its place
        self._share[peer] += 1
        self._bytes += _size(request)

    def take(self, model: str, now: float) -> list[tuple[bytes, Request]]:
        """The requests that can have this model, each with its peer and the time left to it."""
        found = [parked for parked in self._parked.values() if parked.request.model in ("", model)]
        for parked in found:
            self._remove(parked.request.id)
        return [(parked.peer, _rebased(parked, now)) for parked in found]

    def cancel(self, id: bytes) -> bool:
        """Forget a request; False if it does not wait here."""
        known = id in self._parked
        if known:
            self._remove(id)
        return known

    def expire(self, now: float) -> list[tuple[bytes, bytes, HeadraceError]]:
        """Forget what waited too long; peer, id and reason of each."""
        ends: list[tuple[bytes, bytes, HeadraceError]] = []
        for id, parked in list(self._parked.items()):
            if parked.deadline is not None and parked.deadline <= now:
                ends.append((parked.peer, id, too_late()))
            elif now - parked.since > self._config.unavailable_after:
                ends.append((parked.peer, id, unavailable(parked.request.model[:100])))
            else:
                continue
            self._remove(id)
        return ends

    def forget(self, peer: bytes) -> None:
        """Drop what a peer that is gone had here; it will send it again if it returns."""
        if self._share[peer]:
            for id in [id for id, parked in self._parked.items() if parked.peer == peer]:
                self._remove(id)
        del self._share[peer]

    def _check_room(self, peer: bytes, request: Request) -> None:
        limit = self._config.max_queued_requests
        full = len(self._parked) >= limit or self._bytes + _size(request) > _MAX_BYTES
        if full or self._share[peer] + 1 > max(1.0, limit * self._config.client_share):
            raise OverloadedError("No worker group is ready yet and the waiting room is full.", retry_after=5.0)

    def _remove(self, id: bytes) -> None:
        self._uncount(self._parked.pop(id))

    def _uncount(self, parked: Parked) -> None:
        self._share[parked.peer] -= 1
        self._bytes -= _size(parked.request)

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert len(self._parked) <= self._config.max_queued_requests
        assert self._bytes == sum(_size(parked.request) for parked in self._parked.values())
        assert +self._share == Counter(parked.peer for parked in self._parked.values())


def _size(request: Request) -> int:
    return len(request.prompt) + sum(map(len, request.output)) + len(request.model) + len(request.fingerprint)


def _rebased(parked: Parked, now: float) -> Request:
    if parked.deadline is None:
        return parked.request
    return dataclasses.replace(parked.request, budget_ms=int((parked.deadline - now) * 1000))
