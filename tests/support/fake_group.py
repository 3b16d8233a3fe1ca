"""A worker group without a model: a thread that speaks the leader's wire and emits tokens that a function names.

Readable by construction: with `emit = f(assignment, index)` any repeat, gap or wrong resume of a stream is a wrong
token. `kill`, `freeze` and `thaw` play a crash, a stopped process and its return.
"""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import zmq

from headrace.card import ModelCard
from headrace.codec import BLOB_CHUNK, decode, encode
from headrace.errors import InvalidRequestError
from headrace.messages import (
    BROKER_TO_LEADER,
    Assign,
    Assignment,
    Blob,
    Done,
    Drain,
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
)

Emit = Callable[[Assignment, int], int]


def emit_by_seed(assignment: Assignment, index: int) -> int:
    """Tokens that depend on what a replay must preserve: seed, choice and absolute index."""
    seed = int(assignment.sampling.get("seed", 0))
    return int.from_bytes(hashlib.blake2b(f"{seed}/{assignment.choice}/{index}".encode(), digest_size=2).digest()) % 256


def fake_card(name: str = "fake", **changes: Any) -> ModelCard:
    """A card for tests that need no text."""
    fields: dict[str, Any] = {
        "architecture": "FakeForCausalLM",
        "family": "fake",
        "fingerprint": "f0",
        "vocab_size": 256,
        "max_model_len": 4096,
    }
    return ModelCard(name=name, **{**fields, **changes})


class _Row:
    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.next_index = len(assignment.output) // 4
        self.max_tokens = int(assignment.sampling["max_tokens"])
        self.stops = set(assignment.sampling.get("stop_token_ids", ()))


class FakeGroup:
    """A group of one thread.

    Each step every row emits one token; a token among the stop ids of the request or the end tokens of the card ends
    it. `step_delay` is the pause between steps. Use it as a context manager, or start() and stop().
    """

    def __init__(
        self,
        worker_endpoint: str,
        card: ModelCard | None = None,
        blobs: dict[str, bytes] | None = None,
        emit: Emit = emit_by_seed,
        *,
        name: str = "fake-0",
        max_num_seqs: int = 64,
        kv_tokens: int = 1 << 16,
        step_delay: float = 0.001,
    ) -> None:
        self.worker_endpoint = worker_endpoint
        self.card = card or fake_card()
        self.name = name
        self.max_num_seqs = max_num_seqs
        self.kv_tokens = kv_tokens
        self.step_delay = step_delay
        self.emit = emit
        self.welcomes = 0
        self.assigned: list[Assignment] = []  # everything it was ever given
        self.revoked: list[StreamId] = []
        self.steps = 0
        self.failure: str | None = None
        self._blobs = {hashlib.sha256(data).hexdigest(): data for data in (blobs or {}).values()}
        self._rows: dict[StreamId, _Row] = {}
        self._welcomed = threading.Event()
        self._stopping = threading.Event()
        self._running = threading.Event()
        self._running.set()
        self._paused = threading.Event()  # steps off, heartbeats on
        self._commands: list[str] = []
        self._thread = threading.Thread(target=self._main, name=f"group {name}", daemon=True)

    def __enter__(self) -> FakeGroup:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> FakeGroup:
        """Connect and say hello; returns once the broker answered."""
        self._thread.start()
        if not self._welcomed.wait(10):
            self.stop()
            raise AssertionError(f"the broker did not welcome the group: {self.failure}")
        return self

    def stop(self) -> None:
        """End the thread without a word to the broker; the group is silent from now on."""
        self._stopping.set()
        self._running.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert self.failure is None, self.failure

    kill = stop

    def freeze(self) -> None:
        """Stop as SIGSTOP does: no heartbeats, no steps, the connection stays."""
        self._running.clear()

    def thaw(self) -> None:
        """Go on after `freeze`, with everything as it was."""
        self._running.set()

    def hang(self) -> None:
        """Make no more steps, yet send heartbeats."""
        self._paused.set()

    def resume(self) -> None:
        """Step again after `hang`."""
        self._paused.clear()

    def drain(self) -> None:
        """Say Drained at the next turn and drop the rows, as a leader that was told to end does."""
        self._commands.append("drain")

    @property
    def running(self) -> list[StreamId]:
        """Streams it works on."""
        return list(self._rows)

    # ---------------------------------------------------------------------------------------------- the thread

    def _main(self) -> None:
        context = zmq.Context()
        try:
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self.worker_endpoint)
            try:
                self._say_hello(socket)
                self._loop(socket)
            finally:
                socket.close()
        except Exception:
            self.failure = traceback.format_exc()
        finally:
            context.term()

    def _loop(self, socket: zmq.Socket[bytes]) -> None:
        beat_at = hello_at = time.monotonic()
        while not self._stopping.is_set():
            self._running.wait()
            stepping = bool(self._rows) and not self._paused.is_set()
            socket.poll(max(1, int(self.step_delay * 1000)) if stepping else 20)
            while socket.poll(0):
                self._take(socket, decode(socket.recv_multipart(), BROKER_TO_LEADER))
            now = time.monotonic()
            if not self._welcomed.is_set() and now - hello_at > 0.5:
                hello_at = now
                self._say_hello(socket)
            if now - beat_at > 0.25:
                beat_at = now
                load = {"running": len(self._rows), "waiting": 0}
                self._send(socket, Heartbeat(step=self.steps, busy=bool(self._rows), load=load))
            if self._commands and self._commands.pop() == "drain":
                self._rows.clear()
                self._send(socket, Drained())
            if stepping:
                self._step(socket)

    def _say_hello(self, socket: zmq.Socket[bytes]) -> None:
        hello = GroupHello(
            group=self.name,
            card=self.card,
            max_num_seqs=self.max_num_seqs,
            kv_tokens=self.kv_tokens,
            running=tuple(self._rows),
        )
        self._rows.clear()
        self._send(socket, hello)

    def _send(self, socket: zmq.Socket[bytes], message: Any) -> None:
        socket.send_multipart(encode(message))

    def _take(self, socket: zmq.Socket[bytes], message: Any) -> None:
        if isinstance(message, GroupWelcome):
            self.welcomes += 1
            self._welcomed.set()
        elif isinstance(message, Assign):
            for assignment in message.assignments:
                self._assign(socket, assignment)
        elif isinstance(message, Revoke):
            for stream in message.streams:
                self.revoked.append(stream)
                self._rows.pop(stream, None)
        elif isinstance(message, GetBlob):
            data = self._blobs[message.hash]
            part = data[message.offset : message.offset + BLOB_CHUNK]
            self._send(socket, Blob(hash=message.hash, offset=message.offset, total=len(data), data=part))
        elif isinstance(message, Reset):
            self._say_hello(socket)
        elif isinstance(message, Drain):
            self._commands.append("drain")
        elif isinstance(message, Error):
            raise AssertionError(f"the broker refused the group: {message.error}")

    def _assign(self, socket: zmq.Socket[bytes], assignment: Assignment) -> None:
        self.assigned.append(assignment)
        stream = StreamId(assignment.request, assignment.choice, assignment.attempt)
        if len(self._rows) >= self.max_num_seqs:
            error = InvalidRequestError("more streams than rows").to_wire()
            self._send(socket, Refused(refusals=(Refusal(*stream, error),)))
            return
        self._rows[stream] = _Row(assignment)

    def _step(self, socket: zmq.Socket[bytes]) -> None:
        self.steps += 1
        runs, finishes = [], []
        for stream, row in list(self._rows.items()):
            token = self.emit(row.assignment, row.next_index)
            wanted = row.assignment.sampling.get("logprobs")
            logprobs = None if wanted is None else [[-0.5, [[token, -0.5 - k] for k in range(int(wanted))]]]
            runs.append(TokenRun(*stream, row.next_index, pack_tokens([token]), logprobs))
            row.next_index += 1
            ends = set() if row.assignment.sampling.get("ignore_eos") else set(self.card.eos_token_ids)
            early = row.next_index >= int(row.assignment.sampling.get("min_tokens", 0))
            if early and token in ends | row.stops:
                finishes.append(Finish(*stream, "stop", row.next_index, 0))
            elif row.next_index >= row.max_tokens:
                finishes.append(Finish(*stream, "length", row.next_index, 0))
        for finish in finishes:
            del self._rows[StreamId(*finish[:3])]
        if runs:
            self._send(socket, Tokens(runs=tuple(runs), step=self.steps))
        if finishes:
            self._send(socket, Done(finishes=tuple(finishes)))
