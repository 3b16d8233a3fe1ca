"""The registry of worker groups and of the models they serve. Keeps and looks up; decides nothing.

A group is `loading` while the broker fetches blobs of its card, then `ready`; `draining` groups finish what they have.
A model outlives its groups for a while, so that requests can wait for a group that is being restarted.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

from headrace.broker.queues import FairQueue
from headrace.broker.requests import Stream
from headrace.card import ModelCard
from headrace.messages import GroupHello, StreamId

__all__ = ["Group", "GroupState", "Model", "Registry"]


class GroupState(Enum):
    """What a group may be given."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Group:
    """One worker group, as far as its leader told.

    Attributes:
        streams: what it runs, by (request, choice, attempt): a frame of any other attempt finds nothing here.
        hints: streams whose KV it held when it joined.
        exclusive: a stream on probation; until it is over nothing else is placed here.
        revokes: streams to tell the leader to drop at the end of the turn.
    """

    def __init__(self, peer: bytes, hello: GroupHello, now: float) -> None:
        self.peer = peer
        self.name = hello.group
        self.life = hello.life
        self.card = hello.card
        self.max_num_seqs = max(1, hello.max_num_seqs)
        self.kv_tokens = hello.kv_tokens
        self.state = GroupState.LOADING
        self.streams: dict[tuple[bytes, int, int], Stream] = {}
        self.hints = {(s.request, s.choice): s.attempt for s in hello.running}
        self.exclusive: Stream | None = None
        self.revokes: list[StreamId] = []
        self.missing_blobs = set(hello.card.blobs.values())
        self.joined_at = self.heard_at = self.step_at = now
        self.step = 0
        self.load: dict[str, Any] = {}

    @property
    def context(self) -> int:
        """Most tokens of prompt and output together that one of its streams can have."""
        return min(self.card.max_model_len, self.kv_tokens)

    @property
    def free_rows(self) -> int:
        """Streams it could take now."""
        if self.state is not GroupState.READY or self.exclusive is not None:
            return 0
        return self.max_num_seqs - len(self.streams)

    def lives_on_as(self, hello: GroupHello) -> bool:
        """Whether it is this very process that says hello again."""
        return bool(self.life) and self.life == hello.life

    def advance(self, step: int, now: float) -> None:
        """The leader reported its step counter."""
        if step > self.step:
            self.step = step
            self.step_at = now


class Model:
    """A served model: its card, its groups, its queue."""

    def __init__(self, card: ModelCard, now: float) -> None:
        self.card = card
        self.groups: list[Group] = []
        self.queue = FairQueue()
        self.lost_at: float | None = now  # since when no group is ready

    @property
    def ready(self) -> list[Group]:
        """Groups that take streams."""
        return [group for group in self.groups if group.state is GroupState.READY]

    @property
    def context(self) -> int:
        """Most tokens of prompt and output together that some group can hold."""
        return max((group.context for group in self.groups), default=self.card.max_model_len)


class Registry:
    """Groups by connection and by name, models by name."""

    def __init__(self) -> None:
        self.by_peer: dict[bytes, Group] = {}
        self.by_name: dict[str, Group] = {}
        self.models: dict[str, Model] = {}

    def __iter__(self) -> Iterator[Group]:
        return iter(list(self.by_peer.values()))

    def add(self, group: Group, now: float) -> Model:
        """A group joined."""
        assert group.peer not in self.by_peer
        assert group.name not in self.by_name
        self.by_peer[group.peer] = self.by_name[group.name] = group
        model = self.models.get(group.card.name)
        if model is None:
            model = self.models[group.card.name] = Model(group.card, now)
        model.groups.append(group)
        return model

    def ready(self, group: Group) -> Model:
        """The group takes streams from now on; its card is the one that clients see."""
        model = self.models[group.card.name]
        group.state = GroupState.READY
        model.card = group.card
        model.lost_at = None
        return model

    def remove(self, group: Group, now: float) -> Model:
        """A group is gone."""
        del self.by_peer[group.peer]
        del self.by_name[group.name]
        model = self.models[group.card.name]
        model.groups.remove(group)
        self.note_loss(model, now)
        return model

    def note_loss(self, model: Model, now: float) -> None:
        """Start the clock of a model if its last ready group went."""
        if model.lost_at is None and not model.ready:
            model.lost_at = now

    def cards(self) -> tuple[ModelCard, ...]:
        """Cards of the models that have a ready group."""
        return tuple(model.card for model in self.models.values() if model.ready)

    def forget_models(self, now: float, memory: float) -> None:
        """Drop models that had no group for long and have nothing queued."""
        for name, model in list(self.models.items()):
            if not model.groups and not model.queue and model.lost_at is not None and now - model.lost_at > memory:
                del self.models[name]

    @property
    def queued(self) -> int:
        """Streams that wait, over all models."""
        return sum(len(model.queue) for model in self.models.values())

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert set(map(id, self.by_peer.values())) == set(map(id, self.by_name.values()))
        assert sum(len(model.groups) for model in self.models.values()) == len(self.by_peer)
        for model in self.models.values():
            model.queue.validate()
            assert (model.lost_at is None) == bool(model.ready)
        for group in self.by_peer.values():
            assert group in self.models[group.card.name].groups
            assert len(group.streams) <= group.max_num_seqs
            assert group.exclusive is None or group.exclusive.group is group
            for key, stream in group.streams.items():
                assert stream.group is group
                assert key == stream.id
