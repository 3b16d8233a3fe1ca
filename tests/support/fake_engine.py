"""An engine without a model: tokens are f(seed, choice, index), so a repeat, a gap or a wrong resume is a wrong token.

Ranks of tests load it by the path ENGINE. How it behaves is in `fake.json` of the model folder, and while it runs in
files that tests put there:

    hang    steps do not end while it exists
    fail    the next step of the process that takes it raises
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.card import TOKENIZER
from headrace.errors import InvalidRequestError, ModelFilesError
from headrace.messages import Assignment, Finish, Refusal, StreamId, TokenRun, pack_tokens, unpack_tokens
from headrace.workers.config import EngineConfig
from tests.support.fake_group import emit_by_seed, fake_card
from tests.support.tiny_tokenizer import tiny_tokenizer_json

__all__ = ["ENGINE", "FakeEngine", "StepResult", "load"]

ENGINE = "tests.support.fake_engine:load"


@dataclass
class StepResult:
    """As the real one."""

    runs: list[TokenRun] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


@dataclass
class Behaviour:
    """The content of fake.json.

    Attributes:
        step_delay: seconds per step.
        load_steps: words about loading.
        error: how loading ends: "files" raises, "bug" raises, "exit" ends the process.
        diverge: name of the process whose tokens are wrong.
        log: whether every call is written to `calls-<process name>.jsonl`.
        exit_at_token: ends the process when a prompt begins with it.
    """

    step_delay: float = 0.002
    load_steps: int = 3
    error: str = ""
    diverge: str = ""
    log: bool = False
    exit_at_token: int | None = None


class FakeEngine:
    """Every stream gets one token per step."""

    def __init__(self, folder: Path | None = None, name: str = "fake", behaviour: Behaviour | None = None) -> None:
        tokenizer = tiny_tokenizer_json()
        self.blobs = {TOKENIZER: tokenizer}
        self.card = fake_card(name, blobs={TOKENIZER: hashlib.sha256(tokenizer).hexdigest()})
        self.max_num_seqs = 8
        self.kv_tokens = 1 << 16
        self.steps = 0
        self.warm = False
        self.behaviour = behaviour or Behaviour(step_delay=0.0)
        self._folder = folder
        self._me = multiprocessing.current_process().name
        self._rows: dict[tuple[bytes, int], tuple[Assignment, int]] = {}

    # ---------------------------------------------------------------------------------------------- what ranks call

    def warm_up(self, told: Callable[[str], None] = lambda phase: None) -> None:
        """Nothing to do."""
        told("kernels")
        self.warm = True

    @property
    def has_work(self) -> bool:
        """Whether there are streams."""
        return bool(self._rows)

    def add(self, assignment: Assignment, now: float) -> None:
        """Take a stream on, as the real engine does."""
        prompt = list(unpack_tokens(assignment.prompt))
        self._log("add", assignment.request.hex(), assignment.choice, assignment.attempt, now)
        if max(prompt, default=0) >= self.card.vocab_size:
            raise InvalidRequestError("there is no such token", param="prompt")
        if prompt and prompt[0] == self.behaviour.exit_at_token:
            os._exit(3)
        key = (assignment.request, assignment.choice)
        held = self._rows.get(key)
        if held is None or held[0].attempt < assignment.attempt:
            self._rows[key] = (assignment, len(assignment.output) // 4)

    def revoke(self, stream: StreamId) -> None:
        """Drop a stream."""
        self._log("revoke", stream.request.hex(), stream.choice, stream.attempt)
        held = self._rows.get(stream[:2])
        if held is not None and held[0].attempt <= stream.attempt:
            del self._rows[stream[:2]]

    def revoke_all(self) -> None:
        """Drop all streams."""
        self._log("revoke_all")
        self._rows.clear()

    def running(self) -> tuple[StreamId, ...]:
        """All streams."""
        return tuple(StreamId(*key, assignment.attempt) for key, (assignment, _) in self._rows.items())

    def step(self, now: float) -> StepResult:
        """A token for each."""
        self._log("step", now)
        self._misbehave()
        self.steps += 1
        result = StepResult()
        for key, (assignment, index) in list(self._rows.items()):
            token = emit_by_seed(assignment, index)
            if self.behaviour.diverge == self._me:
                token ^= 1
            stream = StreamId(*key, assignment.attempt)
            result.runs.append(TokenRun(*stream, index, pack_tokens([token]), None))
            self._rows[key] = (assignment, index + 1)
            if index + 1 >= int(assignment.sampling["max_tokens"]):
                result.finishes.append(Finish(*stream, "length", index + 1, 0))
                del self._rows[key]
        return result

    def load_gauges(self) -> dict[str, int | float]:
        """A few figures."""
        return {"running": len(self._rows), "waiting": 0}

    # ------------------------------------------------------------------------------------------------------ details

    def _misbehave(self) -> None:
        time.sleep(self.behaviour.step_delay)
        if self._folder is None:
            return
        while (self._folder / "hang").exists():
            time.sleep(0.01)
        try:
            (self._folder / "fail").unlink()
        except FileNotFoundError:
            return
        raise ZeroDivisionError("a step that fails")

    def _log(self, *call: Any) -> None:
        if self.behaviour.log and self._folder is not None:
            with (self._folder / f"calls-{self._me.replace('/', '-')}.jsonl").open("a") as file:
                file.write(json.dumps(call) + "\n")


def load(
    folder: Path, config: EngineConfig, *, name: str | None = None, progress: Callable[[int, int], None] | None = None
) -> FakeEngine:
    """The engine of a folder with a fake.json."""
    behaviour = Behaviour(**json.loads((folder / "fake.json").read_text()))
    for done in range(behaviour.load_steps):
        if progress is not None:
            progress(done + 1, behaviour.load_steps)
    if behaviour.error == "files":
        raise ModelFilesError("model.safetensors is 7 bytes short; fetch it again.", param="folder")
    if behaviour.error == "bug":
        raise ZeroDivisionError("while loading")
    if behaviour.error == "exit":
        os._exit(9)
    return FakeEngine(folder, name or "fake", behaviour)
