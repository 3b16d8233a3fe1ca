"""A worker group of the broker's core without a socket or a model; crashes, stops, hangs and comes back as told."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from headrace.broker.events import Face
from headrace.card import ModelCard
from headrace.codec import BLOB_CHUNK
from headrace.errors import HeadraceError, from_wire
from headrace.messages import (
    Assign,
    Assignment,
    Blob,
    Done,
    Drained,
    Error,
    Finish,
    GetBlob,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Refusal,
    Refused,
    Reset,
    Revoke,
    StreamId,
    TokenRun,
    Tokens,
    pack_tokens,
    unpack_tokens,
)
from headrace.tasks import GENERATE
from tests.broker.answers import EOS, card, emit

if TYPE_CHECKING:
    from tests.broker.world import World


class PureGroup:
    """A worker group: every step each of its rows emits one token.

    `kills(assignment, index)` names the tokens that take the whole group down.
    """

    def __init__(
        self,
        world: World,
        name: str,
        *,
        rows: int = 8,
        kv_tokens: int = 1 << 16,
        model: ModelCard | None = None,
        blobs: Sequence[bytes] = (),
        kills: Callable[[Assignment, int], bool] | None = None,
        life: str = "",
    ) -> None:
        self.world = world
        self.name = name
        self.life = life
        self.max_num_seqs = rows
        self.kv_tokens = kv_tokens
        self.card = model or card()
        self.kills = kills or (lambda assignment, index: False)
        self.blobs = {hashlib.sha256(data).hexdigest(): data for data in blobs}
        self.peer = b""
        self.rows: dict[StreamId, tuple[Assignment, int]] = {}
        self.inbox: deque[Any] = deque()
        self.assigned: list[Assignment] = []
        self.revoked: list[StreamId] = []
        self.refuse_with: HeadraceError | None = None
        self.steps = self.deaths = self.welcomes = self.resets = 0
        self.alive = self.frozen = self.hung = self.mute = False
        self.errors: list[HeadraceError] = []
        world.groups.append(self)

    def start(self) -> PureGroup:
        """A new process under the same name."""
        assert not self.alive
        self.peer = self.world.new_peer(self.name)
        self.inbox.clear()
        self.rows.clear()
        self.steps = 0
        self.alive, self.frozen, self.hung = True, False, False
        self.hello()
        return self

    def die(self) -> None:
        """SIGKILL; the broker learns of it from silence or from a failed send."""
        self.alive = False
        self.deaths += 1
        self.rows.clear()
        self.inbox.clear()

    def hello(self) -> None:
        """Join."""
        running = tuple(self.rows)
        self.rows.clear()
        self.send(
            GroupHello(
                group=self.name,
                card=self.card,
                max_num_seqs=self.max_num_seqs,
                kv_tokens=self.kv_tokens,
                running=running,
                life=self.life,
            )
        )

    def send(self, message: Any) -> None:
        """Say something, if there is somebody to say it."""
        self.world.receive(Face.WORKERS, self.peer, message)

    def read(self) -> None:
        """Take in what came, unless stopped."""
        while self.inbox and self.alive and not self.frozen:
            self._take(self.inbox.popleft())

    def beat(self, **load: Any) -> None:
        """Send a heartbeat."""
        if self.alive and not self.frozen:
            self.send(Heartbeat(step=self.steps, busy=bool(self.rows) and not self.mute, load=load))

    def thaw(self) -> None:
        """SIGCONT: the step that was under way comes out before anything is read."""
        self.frozen = False
        self.step()
        self.read()

    def drain(self) -> None:
        """Hand back all that runs."""
        self.rows.clear()
        self.send(Drained())

    def step(self) -> None:
        """One token for each row."""
        if not self.alive or self.frozen or self.hung or not self.rows:
            return
        self.steps += 1
        runs, finishes = [], []
        for stream, (assignment, index) in list(self.rows.items()):
            if self.kills(assignment, index):
                self.die()
                return
            sampling = assignment.sampling
            token = emit(int(sampling["seed"]), stream.choice, index)
            wanted = sampling.get("logprobs")
            logprobs = None if wanted is None else [[-0.5, [[token, -0.5 - rank] for rank in range(int(wanted))]]]
            runs.append(TokenRun(*stream, index, pack_tokens([token]), logprobs))
            stop = token == EOS and not sampling.get("ignore_eos") and assignment.task == GENERATE
            if stop or index + 1 == int(sampling["max_tokens"]):
                finishes.append(Finish(*stream, "stop" if stop else "length", index + 1, 2))
                del self.rows[stream]
            else:
                self.rows[stream] = (assignment, index + 1)
        self.send(Tokens(runs=tuple(runs), step=self.steps))
        if finishes:
            self.send(Done(finishes=tuple(finishes)))

    def _take(self, message: Any) -> None:
        if isinstance(message, Assign):
            for assignment in message.assignments:
                self._assign(assignment)
        elif isinstance(message, Revoke):
            self.revoked += message.streams
            for stream in message.streams:
                self.rows.pop(stream, None)
        elif isinstance(message, Reset):
            self.resets += 1
            self.hello()
        elif isinstance(message, GetBlob):
            data = self.blobs[message.hash]
            part = data[message.offset : message.offset + BLOB_CHUNK]
            self.send(Blob(hash=message.hash, offset=message.offset, total=len(data), data=part))
        elif isinstance(message, GroupWelcome):
            self.welcomes += 1
        elif isinstance(message, Error):
            self.errors.append(from_wire(message.error))

    def _assign(self, assignment: Assignment) -> None:
        self.assigned.append(assignment)
        stream = StreamId(assignment.request, assignment.choice, assignment.attempt)
        if self.refuse_with is not None:
            self.send(Refused(refusals=(Refusal(*stream, self.refuse_with.to_wire()),)))
            return
        assert len(self.rows) < self.max_num_seqs, "the broker overfilled a group"
        assert not any(key[:2] == stream[:2] for key in self.rows), "two attempts at once on one group"
        held = len(assignment.output) // 4
        whole = [emit(int(assignment.sampling["seed"]), stream.choice, index) for index in range(held)]
        assert list(unpack_tokens(assignment.output)) == whole, "a replay with other tokens"
        self.rows[stream] = (assignment, held)
