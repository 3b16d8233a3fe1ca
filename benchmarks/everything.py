"""All that there is to say of some shapes: the table of published figures and goals, remade here.

    decode      a token at batch 1 beside the peers, and larger batches; encoders, one pass
    prefill     long prompts, and throughput: many requests at once, with one engine for both
    startup     cold and warm
    compare     in process, and through broker and client
    serve       at a steady rate

A shape of which figures are published gets just their cases; any other one a small case of each part. What needs
weights in fewer bits is listed as not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace.benchmarks.compare import compare
from headrace.benchmarks.measure import Case
from headrace.benchmarks.measures import MEASURES
from headrace.benchmarks.published import PUBLISHED, Published
from headrace.benchmarks.report import Row
from headrace.benchmarks.serving import Load, serve_source
from headrace.benchmarks.session import Session
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.startup import startup
from headrace.errors import HeadraceError

__all__ = ["PARTS", "known_shapes", "measure_everything"]

_OUTPUTS = {"decode": 128, "prefill": 1, "throughput": 256, "encode": 0}
_ONE_TOKEN_OUTPUTS = 48  # at batch 1, where peers are slow
_ROUNDS = {"decode": 1, "prefill": 3, "throughput": 1, "encode": 20}
_SMALL = {
    "decode": (1, 128, 32),
    "prefill": (1, 512, 1),
    "throughput": (8, 64, 32),
    "encode": (1, 128, 0),
}
_RATE = 4.0  # requests a second
_SERVED = 32  # requests


def known_shapes() -> tuple[str, ...]:
    """Those of which figures are published, in order."""
    return tuple(dict.fromkeys(entry.shape for entry in PUBLISHED))


def measure_everything(session: Session, parts: Sequence[str]) -> None:
    """Measure parts, each for all models that they are about; what fails costs its rows.

    Args:
        session: with the models.
        parts: names of PARTS.
    """
    for part in parts:
        for source in session.settings.sources:
            if session.over:
                session.terminal.note("The time is over; what is left is not measured.")
                return
            try:
                PARTS[part](session, source)
            except HeadraceError as error:
                session.terminal.note(f"{part} of {source.name} failed: {error.message}")
                session.report.add(_failed(part, source, error.message))


def _decode(session: Session, source: Source) -> None:
    generates = session.model(source)["generates"]
    session.compare(_cases(session, source, "decode" if generates else "encode"))
    _add_unmeasured(session, source)


def _prompts(session: Session, source: Source) -> None:
    if session.model(source)["generates"]:
        session.compare([*_cases(session, source, "prefill"), *_cases(session, source, "throughput")])


def _startup(session: Session, source: Source) -> None:
    if _wanted(source, "startup warm"):
        startup(session, source, starts=1)


def _compare(session: Session, source: Source) -> None:
    if not session.model(source)["generates"]:
        return
    for case in _cases(session, source, "throughput"):
        compare(
            session,
            source,
            requests=case.batch,
            prompt_tokens=case.prompt_tokens,
            output_tokens=case.output_tokens,
        )


def _serve(session: Session, source: Source) -> None:
    if not session.model(source)["generates"]:
        return
    for case in _cases(session, source, "throughput"):
        load = Load(
            requests=_SERVED,
            prompt_tokens=case.prompt_tokens,
            output_tokens=case.output_tokens,
            rate=_RATE,
            concurrency=None,
            seed=session.settings.seed,
        )
        serve_source(session, source, load)


PARTS: dict[str, Callable[[Session, Source], None]] = {
    "decode": _decode,
    "prefill": _prompts,
    "startup": _startup,
    "compare": _compare,
    "serve": _serve,
}


def _entries(source: Source) -> list[Published]:
    return [entry for entry in PUBLISHED if entry.shape == source.shape]


def _wanted(source: Source, measure: str) -> bool:
    """Whether a part is about a model: of those with published figures, only if it is among them."""
    entries = _entries(source)
    return not entries or any(entry.measure == measure for entry in entries)


def _cases(session: Session, source: Source, measure: str) -> list[Case]:
    """Those of published figures, or one small case."""
    if not _entries(source):
        batch, prompt, output = _SMALL[measure]
        return [_case(source, measure, batch, prompt, output)]
    dtype = session.model(source)["dtype"]
    cases = []
    for entry in _entries(source):
        if entry.measure == measure and entry.dtype == dtype:
            assert entry.prompt_tokens is not None
            output = entry.output_tokens or _OUTPUTS[measure]
            if measure == "decode" and entry.batch == 1:
                output = _ONE_TOKEN_OUTPUTS
            cases.append(_case(source, measure, entry.batch, entry.prompt_tokens, output))
    return cases


def _case(source: Source, measure: str, batch: int, prompt: int, output: int) -> Case:
    return Case(
        measure=measure,
        source=source,
        batch=batch,
        prompt_tokens=prompt,
        output_tokens=output,
        rounds=_ROUNDS[measure],
        alone=batch > 1 or measure not in ("decode", "encode"),
    )


def _add_unmeasured(session: Session, source: Source) -> None:
    """Goals that ask for what is not there yet."""
    own = session.model(source)["dtype"]
    for entry in _entries(source):
        if entry.measure not in MEASURES or not entry.dtype.endswith(" weights"):
            continue
        measure = MEASURES[entry.measure]
        case: dict[str, Any] = {"batch": entry.batch, "prompt_tokens": entry.prompt_tokens}
        case |= {} if entry.output_tokens is None else {"output_tokens": entry.output_tokens}
        known = session.report.known(entry.measure, source.shape, entry.dtype, **case)
        if known:
            session.report.add(
                Row(
                    measure=entry.measure,
                    title=measure.title,
                    unit=measure.unit,
                    more_is_better=measure.more_is_better,
                    model=source.name,
                    dtype=entry.dtype,
                    case=case,
                    figures={session.ours: {"error": f"weights in fewer bits than {own} are not run yet"}},
                    **known,
                )
            )


def _failed(part: str, source: Source, why: str) -> Row:
    return Row(
        measure=part,
        title=f"Failed: {part}",
        unit="-",
        model=source.name,
        dtype=source.dtype,
        case={},
        figures={"headrace": {"error": why}},
    )
