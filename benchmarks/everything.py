"""All that there is to say of some shapes: the table of published figures and goals, remade here.

    decode      a token at batch 1 beside the peers, and larger batches; encoders, one pass
    prefill     long prompts, and throughput: many requests at once, with one engine for both
    startup     cold and warm
    compare     in process, and through broker and client
    serve       at a steady rate

A shape of which figures are published gets just their cases; any other one a small case of each part. Those of weights
in 8 bits come after the others of their part, in `decode` and `prefill`. If all is to be quantized, all cases of the
shape are measured so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace.benchmarks.compare import compare
from headrace.benchmarks.measure import Case
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
    measure = "decode" if session.model(source)["generates"] else "encode"
    session.compare([*_cases(session, source, measure), *_quantized(session, source, measure)])


def _prompts(session: Session, source: Source) -> None:
    if session.model(source)["generates"]:
        measures = ("prefill", "throughput")
        cases = [case for measure in measures for case in _cases(session, source, measure)]
        session.compare([*cases, *(case for measure in measures for case in _quantized(session, source, measure))])


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
        return [_case(source, measure, *_SMALL[measure])]
    found = _published(session, source, measure)
    return list(dict.fromkeys(_of(source, entry) for entry in found if entry.quantize in (None, source.quantize)))


def _quantized(session: Session, source: Source, measure: str) -> list[Case]:
    """Those of published figures of a model that is quantized where this one is not."""
    if source.quantize is not None:
        return []
    found = [entry for entry in _published(session, source, measure) if entry.quantize is not None]
    return [_of(replace(source, quantize=entry.quantize), entry) for entry in found]


def _published(session: Session, source: Source, measure: str) -> list[Published]:
    """What is published of a measurement in the type of a model."""
    dtype = session.model(source)["dtype"]
    return [entry for entry in _entries(source) if entry.measure == measure and entry.dtype == dtype]


def _of(source: Source, entry: Published) -> Case:
    """The case of published figures, of a model."""
    assert entry.prompt_tokens is not None
    output = entry.output_tokens or _OUTPUTS[entry.measure]
    if entry.measure == "decode" and entry.batch == 1:
        output = _ONE_TOKEN_OUTPUTS
    return _case(source, entry.measure, entry.batch, entry.prompt_tokens, output)


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


def _failed(part: str, source: Source, why: str) -> Row:
    return Row(
        measure=part,
        title=f"Failed: {part}",
        unit="-",
        model=source.name,
        dtype=source.dtype,
        quantize=source.quantize,
        case={},
        figures={"headrace": {"error": why}},
    )
