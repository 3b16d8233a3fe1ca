"""Who is measured: a subject loads one model at a time, and generates or reads a batch as often as it is asked.

Each runs in a process of its own (`run_subject`), so that what a peer breaks or how much memory it takes costs one row.
All get the same prompts, the same sampling (greedy unless a case says otherwise) and as many tokens as were asked for,
whatever they mean.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.benchmarks.measure import Timeline
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.worker import answer

__all__ = ["OURS", "SUBJECTS", "Entry", "Room", "Subject", "run_subject", "usual_peers"]

OURS = "headrace"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a subject is.

    Attributes:
        place: module:class.
        arguments: of that, besides the device.
        warms_whole: whether its untimed round must be as long as the others, because it compiles for each length.
        usual: the package without which there is none, of a peer that is measured unless others are named; else None.
    """

    place: str
    arguments: dict[str, Any] = field(default_factory=dict)
    warms_whole: bool = False
    usual: str | None = None


SUBJECTS: dict[str, Entry] = {
    OURS: Entry("headrace.benchmarks.ours:Headrace", {"graphs": True}),
    "headrace-eager": Entry("headrace.benchmarks.ours:Headrace", {"graphs": False}),
    "headrace-library": Entry("headrace.benchmarks.peers:Library"),
    "transformers": Entry("headrace.benchmarks.peers:Transformers", usual="transformers"),
    "transformers-compile": Entry("headrace.benchmarks.peers:CompiledTransformers", warms_whole=True),
    "deepspeed": Entry("headrace.benchmarks.peers:DeepSpeed", usual="deepspeed"),
    "vllm": Entry("headrace.benchmarks.peers:VLLM", usual="vllm"),
}


def usual_peers() -> tuple[str, ...]:
    """Who is measured beside ours if nobody is named: of those that are usual, who is installed. Imports none."""
    return tuple(
        name for name, entry in SUBJECTS.items() if entry.usual is not None and importlib.util.find_spec(entry.usual)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a subject must have room for, over all cases of a model.

    Attributes:
        sequences: at once.
        length: tokens of the longest sequence.
        tokens: of all sequences together.
        step_tokens: budget of one step, where a subject has one.
        seed: of random weights.
    """

    sequences: int
    length: int
    tokens: int
    step_tokens: int
    seed: int


class Subject(Protocol):
    """One engine."""

    def load(self, source: Source, room: Room) -> dict[str, Any]:
        """Get a model ready; facts about it."""

    def generate(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_decode: Callable[[], None] | None = None,
    ) -> Timeline:
        """Continue prompts, all at once; `on_decode` is called when all sequences have their first token."""

    def encode(self, texts: list[list[int]]) -> Timeline:
        """Read texts, all at once."""

    def unload(self) -> None:
        """Free what the model takes."""


def run_subject(*, name: str, device: str, threads: int) -> None:
    """Be a subject.

    Raises:
        ConfigError: there is no such device.
    """
    from headrace.workers.rank_threads import use_threads

    use_threads(threads, crowded=True)  # the others wait on the same cores
    from headrace.workers.device import pick_device

    entry = SUBJECTS[name]
    module, _, kind = entry.place.partition(":")
    place = pick_device(device)
    subject = getattr(importlib.import_module(module), kind)(device=place, **entry.arguments)
    orders = _Orders(subject, gpu=place.type == "cuda")
    answer({order: getattr(orders, order) for order in ("load", "generate", "encode", "profile", "unload")})


class _Orders:
    """A subject behind plain values."""

    def __init__(self, subject: Subject, *, gpu: bool) -> None:
        self._subject = subject
        self._gpu = gpu

    def load(self, source: dict[str, Any], room: dict[str, Any]) -> dict[str, Any]:
        return self._subject.load(Source(**source), Room(**room))

    def generate(self, prompts: dict[str, int], output_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        return self._subject.generate(_made(prompts), output_tokens, **sampling).to_wire()

    def encode(self, prompts: dict[str, int], output_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        return self._subject.encode(_made(prompts)).to_wire()

    def profile(self, task: str, load: dict[str, Any], decoding: bool, trace: str | None) -> dict[str, Any]:
        from headrace.benchmarks.traces import traced

        texts, subject = _made(load["prompts"]), self._subject

        def run(begin: Callable[[], None]) -> int:
            if decoding:
                return len(subject.generate(texts, load["output_tokens"], on_decode=begin, **load["sampling"]).gaps)
            begin()
            if task == "encode":
                subject.encode(texts)
            else:
                subject.generate(texts, load["output_tokens"], **load["sampling"])
            return 1

        return traced(run, trace, gpu=self._gpu)

    def unload(self) -> None:
        self._subject.unload()
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _made(prompts: dict[str, int]) -> list[list[int]]:
    from headrace.benchmarks.metrics import prompts as make

    return make(**prompts)
