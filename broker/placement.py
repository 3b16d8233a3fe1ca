"""Which group runs a stream next: a pure choice over the groups' loads and what their prefix caches likely hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from headrace.broker.groups import Group
from headrace.broker.requests import TOKEN_BYTES, Stream

__all__ = ["PrefixAffinity", "can_run", "choose", "is_settled"]

_PREFIX_BYTES = 128 * TOKEN_BYTES  # long enough to tell system prompts apart, short enough to meet again


class PrefixAffinity:
    """Remembers which group last saw a prompt's beginning; bounded, least recently used goes first."""

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._groups: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def group_for(self, stream: Stream) -> str | None:
        """The name of the group that likely holds the prefix."""
        return self._groups.get(stream.job.prompt[:_PREFIX_BYTES])

    def remember(self, stream: Stream, group: Group) -> None:
        """The group computes the prefix now."""
        key = stream.job.prompt[:_PREFIX_BYTES]
        self._groups[key] = group.name
        self._groups.move_to_end(key)
        if len(self._groups) > self._capacity:
            self._groups.popitem(last=False)


def can_run(stream: Stream, group: Group) -> bool:
    """Whether the group can hold the stream, and its model is the one that made the tokens so far."""
    same = not stream.fingerprint or stream.fingerprint == group.card.fingerprint
    return same and stream.job.context <= group.context


def is_settled(group: Group, steps: int) -> bool:
    """Whether every stream aboard has been stepping for a while, so that a newcomer would be the only suspect."""
    return all(s.first_step >= 0 and group.step - s.first_step >= steps for s in group.streams.values())


def choose(stream: Stream, groups: Sequence[Group], affinity: PrefixAffinity) -> Group | None:
    """The best of the groups with free rows: one that ran the stream, one that knows the prefix, the least loaded."""
    fit = [group for group in groups if group.free_rows > 0 and can_run(stream, group)]
    if not fit:
        return None
    key = (stream.job.id, stream.choice)
    for group in fit:
        if key in group.hints:
            return group
    least = min(fit, key=_load)
    wanted = affinity.group_for(stream)
    for group in fit:
        # A cached prefix saves a prefill; it is not worth waiting behind a notably fuller batch.
        if group.name == wanted and len(group.streams) <= len(least.streams) + max(4, group.max_num_seqs // 4):
            return group
    return least


def _load(group: Group) -> tuple[float, str]:
    return len(group.streams) / group.max_num_seqs, group.name
