"""What a caller is told when it waited too long, and when that is. Pure: the times are arguments."""

from __future__ import annotations

from headrace.client.flights import Flight
from headrace.client.link import Connection
from headrace.client.types import Timeouts
from headrace.errors import BrokerConnectionError, DeadlineExceededError, HeadraceError, RequestTimeoutError

__all__ = ["Overdue"]

_ANSWER_WITHIN = 30.0


class Overdue:
    """The limits of one client."""

    def __init__(self, endpoint: str, timeouts: Timeouts) -> None:
        self._endpoint = endpoint
        self._timeouts = timeouts

    def flight(self, flight: Flight, link: Connection, now: float) -> HeadraceError | None:
        """The error that ends a request which waited too long, for whatever it waits."""
        if flight.deadline is not None and now >= flight.deadline:
            return DeadlineExceededError(
                f"The answer was not complete within the {flight.spec.timeout:g} s allowed; "
                "allow more or ask for fewer tokens."
            )
        unheard = not flight.accepted and not flight.has_tokens
        if not link.ready and unheard and now >= flight.since:
            return self.question(flight.since, link, now)
        return self._stuck(flight, link, now)

    def question(self, asked_at: float, link: Connection, now: float) -> HeadraceError | None:
        """The error that answers a question in the broker's place."""
        if link.ready:
            if now - asked_at < _ANSWER_WITHIN:
                return None
            return RequestTimeoutError(
                f"The broker at {self._endpoint} did not answer a question within {_ANSWER_WITHIN:g} s; "
                "look at its log."
            )
        if now - max(asked_at, link.down_since) < self._timeouts.connect:
            return None
        return link.refusal or BrokerConnectionError(
            f"There is no broker at {self._endpoint}: none answered within {self._timeouts.connect:g} s. "
            "Start one with `headrace up`, or set HEADRACE_ENDPOINT to where it listens."
        )

    def _stuck(self, flight: Flight, link: Connection, now: float) -> HeadraceError | None:
        begun = flight.has_tokens
        limit = self._timeouts.between_tokens if begun else self._timeouts.first_token
        if limit is None or now - (flight.progress_at if begun else flight.started) < limit:
            return None
        what = f"no {'further' if begun else 'first'} token within {limit:g} s"
        why = (
            "the workers are stuck or overloaded; see `headrace status`"
            if link.ready
            else f"the broker at {self._endpoint} went away and did not come back"
        )
        return RequestTimeoutError(f"There was {what}: {why}.")
