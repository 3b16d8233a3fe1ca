"""Runs cases over subjects: every subject in a process of its own, all with the same prompts, in turns round by round.

The processes live on from model to model; one that fails is ended, costs the row that it failed in, and is started
again for the next. Ours loads first, so that a peer's appetite for memory is the peer's loss.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from headrace.benchmarks.measure import Case, Measure, Timeline
from headrace.benchmarks.measures import MEASURES
from headrace.benchmarks.report import Report, Row
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.subject import OURS, SUBJECTS, Room, run_subject
from headrace.benchmarks.surveyor import survey
from headrace.benchmarks.worker import OrderError, Worker

__all__ = ["Comparison", "Surveyor"]

_PATIENCE = 900.0  # seconds for one order; compilers are slow
_OVERTIME = 60.0  # seconds that an order which began in time may take beyond the deadline
_WARM_TOKENS = 8  # of the round that nobody times: compilers see each kind of step, and caches fill


class Surveyor:
    """The parent's side of the surveyor."""

    def __init__(self, device: str, threads: int) -> None:
        self._worker = Worker("bench-survey", survey, {"device": device, "threads": threads})

    def __enter__(self) -> Surveyor:
        self._worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def ask(self, order: str, **fields: Any) -> Any:
        """What an order brings; see `surveyor`.

        Raises:
            OrderError: it failed.
        """
        return self._worker.ask(order, limit=_PATIENCE, **fields)


class _Runner:
    """One subject's process, with the model that it should have."""

    def __init__(self, name: str, settings: dict[str, Any], deadline: float) -> None:
        self.name = name
        self._deadline = deadline
        self._settings = {"name": name, **settings}
        self._worker: Worker | None = None
        self._wanted: tuple[Source, Room] | None = None
        self._loaded = False
        self._refused: str | None = None  # why the model that is wanted cannot be loaded

    def begin(self) -> None:
        """Start the process, which may take a while to be ready."""
        if self._worker is None:
            self._worker = Worker(f"bench-{self.name}", run_subject, self._settings).start()
            self._loaded = False

    def want(self, source: Source, room: Room) -> None:
        """From now on all orders are about this model."""
        if self._wanted != (source, room):
            self.release()
            self._wanted, self._refused = (source, room), None

    def release(self) -> None:
        """Free what the model takes; it is loaded again when it is needed."""
        if self._loaded:
            self._loaded = False
            self._try("unload")

    def ask(self, order: str, **fields: Any) -> Any:
        """Carry out an order, with the model loaded.

        Raises:
            OrderError: it failed.
        """
        if self._refused is not None:
            raise OrderError(self._refused)
        if not self._loaded:
            self._load()
        return self._order(order, **fields)

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
        self._worker, self._loaded = None, False

    def _load(self) -> None:
        assert self._wanted is not None
        self.begin()
        source, room = self._wanted
        try:
            self._order("load", source=asdict(source), room=asdict(room))
        except OrderError as error:
            self._refused = str(error)
            raise
        self._loaded = True

    def _order(self, order: str, **fields: Any) -> Any:
        assert self._worker is not None
        limit = min(_PATIENCE, max(0.0, self._deadline - time.monotonic()) + _OVERTIME)
        try:
            return self._worker.ask(order, limit=limit, **fields)
        except OrderError:
            self.close()  # nobody knows what it left behind
            raise

    def _try(self, order: str) -> None:
        try:
            self._order(order)
        except OrderError:
            return


class Comparison:
    """Ours and peers on one device, until it is closed.

    Args:
        surveyor: knows the limits.
        report: gets the rows.
        peers: names of subjects besides ours.
        settings: device and threads of the processes.
        ours: which of the subjects is ours: `headrace`, or without graphs.
        step_tokens: budget of one step, where a subject has one.
        seed: of weights and prompts.
        note: is told what happens.
        deadline: on the monotonic clock; what does not begin before it is left out.
    """

    def __init__(
        self,
        surveyor: Surveyor,
        report: Report,
        *,
        peers: Sequence[str],
        settings: dict[str, Any],
        ours: str = OURS,
        step_tokens: int = 8192,
        seed: int = 0,
        note: Callable[[str], None] = lambda _: None,
        deadline: float = float("inf"),
    ) -> None:
        self._surveyor = surveyor
        self._report = report
        self._runners = [_Runner(name, settings, deadline) for name in dict.fromkeys((ours, *peers))]
        self._step_tokens = step_tokens
        self._seed = seed
        self._note = note
        self._deadline = deadline

    def close(self) -> None:
        """End all processes."""
        for runner in self._runners:
            runner.close()

    def release(self) -> None:
        """Leave the device to others."""
        for runner in self._runners:
            runner.release()

    def run(self, cases: Sequence[Case], *, trace: Path | None = None) -> list[dict[str, Any]]:
        """Measure cases of one model; what the profiler found of each, if traces are wanted.

        Args:
            cases: with the same source.
            trace: folder for traces of the profiler; None for none.
        """
        source = cases[0].source
        assert all(case.source == source for case in cases)
        model = self._surveyor.ask("model", source=asdict(source))
        fitting = [case for case in cases if case.length <= model["max_positions"]]
        for case in cases:
            if case not in fitting:
                self._leave_out(case, model, f"the model was made for {model['max_positions']:,} tokens")
        if not fitting:
            return []
        runners = self._runners[:1] if all(case.alone for case in fitting) else self._runners
        for runner in self._runners:
            if runner not in runners:
                runner.release()
        for runner in runners:
            runner.begin()  # all of them at once, for each takes a while
        for runner in runners:
            runner.want(source, self._room(fitting))
        found = []
        for case in fitting:
            if time.monotonic() > self._deadline:
                self._leave_out(case, model, "not measured: the time was over")
                continue
            self._measure(case, model)
            if trace is not None:
                found += self._profile(case, model, trace)
        return found

    def _room(self, cases: Sequence[Case]) -> Room:
        return Room(
            sequences=max(case.batch for case in cases),
            length=max(case.length for case in cases),
            tokens=max(case.batch * case.length for case in cases),
            step_tokens=self._step_tokens,
            seed=self._seed,
        )

    def _measure(self, case: Case, model: dict[str, Any]) -> None:
        measure = MEASURES[case.measure]
        runners = self._runners[:1] if case.alone else self._runners
        timelines: dict[str, list[Timeline]] = {runner.name: [] for runner in runners}
        failed: dict[str, str] = {}
        warm = replace(case, output_tokens=min(case.output_tokens, _WARM_TOKENS))
        for number in range(-1, case.rounds):
            for runner in runners:
                if runner.name in failed:
                    continue
                whole = number >= 0 or SUBJECTS[runner.name].warms_whole
                try:
                    timeline = self._round(runner, measure, case if whole else warm, model, number)
                except OrderError as error:
                    failed[runner.name] = str(error)
                    continue
                if number >= 0:
                    timelines[runner.name].append(timeline)
        figures = {
            name: {"error": failed[name]} if name in failed else _figure(measure, case, found)
            for name, found in timelines.items()
        }
        _compare(figures, timelines, measure, self._runners[0].name)
        self._add(case, model, figures)

    def _round(self, runner: _Runner, measure: Measure, case: Case, model: dict[str, Any], number: int) -> Timeline:
        time.sleep(case.pause)
        return Timeline(**runner.ask(measure.task, **self._load(case, model, number)))

    def _load(self, case: Case, model: dict[str, Any], number: int) -> dict[str, Any]:
        """How many tokens to generate, how they are drawn, and how to make prompts.

        These are new ones each round, so that no cache spares anybody what the others have to do.
        """
        prompts = {
            "count": case.batch,
            "length": case.prompt_tokens,
            "vocab_size": model["vocab_size"],
            "seed": self._seed + 1 + number,
        }
        return {"prompts": prompts, "output_tokens": case.output_tokens, "sampling": case.sampling}

    def _profile(self, case: Case, model: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        runner, measure = self._runners[0], MEASURES[case.measure]
        parts = (case.source.name, case.source.quantize, case.measure, f"batch-{case.batch}")
        path = folder / f"{'-'.join(part for part in parts if part)}.trace.json"
        try:
            found: dict[str, Any] = runner.ask(
                "profile",
                task=measure.task,
                load=self._load(case, model, 0),
                decoding=case.measure == "decode",
                trace=str(path.absolute()),
            )
        except OrderError as error:
            self._note(f"no trace of {case.source.name}: {error}")
            return []
        work = self._surveyor.ask("work", case=asdict(case), **self._rates())
        return [found | {"case": _named(case), "work": work, "trace": str(path)}]

    def _rates(self) -> dict[str, Any]:
        """Of the device, as the surveyor takes them."""
        ceilings = self._report.facts["ceilings"]
        return {name: ceilings[name] for name in ("read", "matmul")}

    def _leave_out(self, case: Case, model: dict[str, Any], why: str) -> None:
        self._add(case, model, {self._runners[0].name: {"error": why}})

    def _add(self, case: Case, model: dict[str, Any], figures: dict[str, dict[str, Any]]) -> None:
        measure, dtype = MEASURES[case.measure], model["dtype"]
        least = self._surveyor.ask("least", case=asdict(case), **self._rates())
        load = {"batch": case.batch, "prompt_tokens": case.prompt_tokens}
        load |= {} if measure.task == "encode" else {"output_tokens": case.output_tokens}
        known = self._report.known(case.measure, case.source.shape, dtype, case.source.quantize, **load)
        row = Row(
            measure=case.measure,
            title=measure.title,
            unit=measure.unit,
            more_is_better=measure.more_is_better,
            model=case.source.name,
            dtype=dtype,
            quantize=case.source.quantize,
            case=load | case.sampling,
            figures=figures,
            limit=measure.figure(case, least),
            **({} if case.sampling else known),  # published figures are greedy
        )
        self._report.add(row)
        said = ", ".join(f"{name} {_said(figure)}" for name, figure in figures.items())
        self._note(f"{_named(case)}: {said}")


def _figure(measure: Measure, case: Case, timelines: Sequence[Timeline]) -> dict[str, Any]:
    times = [time for timeline in timelines for time in measure.times(timeline)]
    if not times:
        return {"error": "too few steps in which all sequences decoded; ask for more output tokens"}
    return {"value": measure.figure(case, statistics.median(times)), **measure.details(case, timelines)}


def _compare(
    figures: dict[str, dict[str, Any]], timelines: dict[str, list[Timeline]], measure: Measure, ours: str
) -> None:
    """How many times as long peers take: the median of the rounds' own ratios, so a slow spell hits both sides."""
    own = [statistics.median(measure.times(timeline)) for timeline in timelines[ours] if measure.times(timeline)]
    for name, figure in figures.items():
        theirs = [statistics.median(measure.times(timeline)) for timeline in timelines[name] if measure.times(timeline)]
        if name != ours and "error" not in figure and own and len(own) == len(theirs):
            figure["times_ours"] = statistics.median(peer / mine for peer, mine in zip(theirs, own, strict=True))


def _named(case: Case) -> str:
    quantize = f" {case.source.quantize}" if case.source.quantize else ""
    return f"{case.measure} {case.source.name}{quantize} batch {case.batch} prompt {case.prompt_tokens}"


def _said(figure: dict[str, Any]) -> str:
    return str(figure["error"]) if "error" in figure else f"{figure['value']:.4g}"
