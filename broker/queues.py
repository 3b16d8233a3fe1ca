"""The queue of one model: fair between connections, with a fast lane for streams that lost their group. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from headrace.broker.requests import Stream

__all__ = ["FairQueue"]

_Lane = OrderedDict[Stream, None]


class FairQueue:
    """Streams that wait for a row.

    Three parts, served in this order: suspects, which must run apart from other unproven streams; the front, streams
    that ran before; and one lane per connection, served in turn, so that a thousand requests of one delay another's
    single one by one place only.
    """

    def __init__(self) -> None:
        self.suspects: _Lane = OrderedDict()
        self._front: _Lane = OrderedDict()
        self._lanes: OrderedDict[bytes, _Lane] = OrderedDict()
        self._count = 0
        self.tokens = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Stream]:
        for lane in (self.suspects, self._front, *self._lanes.values()):
            yield from lane

    def waiting_for(self, owner: bytes) -> int:
        """How many streams of one connection wait for their first row."""
        lane = self._lanes.get(owner)
        return len(lane) if lane else 0

    def push(self, stream: Stream) -> None:
        """A stream that never ran."""
        self._enter(stream, self._lane_of(stream))

    def push_front(self, streams: Sequence[Stream]) -> None:
        """Streams that ran before, in order, ahead of all that wait."""
        for stream in reversed(streams):
            lane = self.suspects if stream.probation else self._front
            self._enter(stream, lane)
            lane.move_to_end(stream, last=False)

    def put_back(self, streams: Sequence[Stream]) -> None:
        """Streams that were popped in this order and found no group: each goes where it came from."""
        for stream in reversed(streams):
            lane = self._front if stream.have or stream.attempt else self._lane_of(stream)
            self._enter(stream, lane)
            lane.move_to_end(stream, last=False)

    def pop(self) -> Stream | None:
        """The next stream that is no suspect."""
        lane = self._front
        if not lane:
            owner = next(iter(self._lanes), None)
            if owner is None:
                return None
            self._lanes.move_to_end(owner)
            lane = self._lanes[owner]
        stream = next(iter(lane))
        self.remove(stream)
        return stream

    def remove(self, stream: Stream) -> None:
        """Take a stream out."""
        lane = stream.lane
        assert lane is not None
        del lane[stream]
        stream.lane = None
        self._count -= 1
        self.tokens -= stream.job.prompt_tokens
        if not lane and lane is self._lanes.get(stream.job.owner):
            del self._lanes[stream.job.owner]

    def _lane_of(self, stream: Stream) -> _Lane:
        owner = stream.job.owner
        lane = self._lanes.get(owner)
        if lane is None:
            lane = self._lanes[owner] = OrderedDict()
        return lane

    def _enter(self, stream: Stream, lane: _Lane) -> None:
        assert stream.lane is None
        lane[stream] = None
        stream.lane = lane
        self._count += 1
        self.tokens += stream.job.prompt_tokens

    def validate(self) -> None:
        """Assert what must hold between events."""
        streams = list(self)
        assert len(streams) == self._count
        assert sum(stream.job.prompt_tokens for stream in streams) == self.tokens
        assert all(self._lanes.values())
        for stream in streams:
            assert stream.lane is not None
            assert stream in stream.lane
            assert not stream.ended
