"""Rows as they are measured, in a JSON file that is whole after every one, and as tables made of that file alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace.benchmarks.published import DATE, DEVICE, Value, find
from headrace.benchmarks.subject import OURS
from headrace.errors import ConfigError
from headrace.scripts.terminal import table

__all__ = ["PHASES", "Report", "Row", "amount", "read_report", "report_lines", "span", "verdict"]

# Of a start.
PHASES = ("imports", "model", "compile", "weights", "memory", "kernels", "graphs", "broker", "first_token")
_VERSION = 1
_CASE = {
    "batch": "batch",
    "requests": "requests",
    "rate": "req/s",
    "prompt_tokens": "prompt",
    "output_tokens": "output",
    "temperature": "temp",
    "top_p": "top-p",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case.

    Attributes:
        measure: its kind.
        title: of the table it belongs to.
        unit: of its figures.
        more_is_better: whether large figures are good.
        model: name of the shape or model.
        dtype: of its weights, and of keys and values.
        quantize: int8 or fp8, in which the weights of its layers are kept instead; None if they are not.
        case: the load: batch, prompt_tokens, output_tokens, requests, rate; temperature and top_p if tokens are drawn.
        figures: by subject: `value` and more, or `error`.
        limit: what no implementation can do better, in the unit.
        goal: of ours, on the device that was measured.
        published: what others were measured with on such a device, elsewhere; by name.
    """

    measure: str
    title: str
    unit: str
    model: str
    dtype: str
    case: dict[str, Any]
    figures: dict[str, dict[str, Any]]
    more_is_better: bool = False
    quantize: str | None = None
    limit: float | None = None
    goal: float | None = None
    published: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model, and how it is quantized if it is."""
        return f"{self.model}, {self.quantize}" if self.quantize else self.model

    def value(self, subject: str) -> float | None:
        """The figure of a subject; None if it has none."""
        value = self.figures.get(subject, {}).get("value")
        return None if value is None else float(value)


class Report:
    """Collects rows, and keeps the file.

    Args:
        path: of the file; None for none.
        facts: device, software, settings.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.rows: list[Row] = []
        self.facts = dict(facts)
        self._path = path
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"There is no folder for {str(path)!r}; make it, or give another file.", param="json")

    def add(self, row: Row) -> None:
        """Take a row on, and write the file anew."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file; what was there stays whole until then."""
        if self._path is None:
            return
        content = {"version": _VERSION, "facts": self.facts, "rows": [asdict(row) for row in self.rows]}
        new = self._path.with_name(self._path.name + ".new")
        new.write_text(json.dumps(_rounded(content), indent=1) + "\n")
        new.replace(self._path)

    def known(
        self, measure: str, shape: str | None, dtype: str, quantize: str | None = None, **case: int
    ) -> dict[str, Any]:
        """What is published of a case, as fields of a row; nothing on another device, or of another model."""
        if shape is None or not str(self.facts.get("device", "")).startswith(DEVICE):
            return {}
        entry = find(measure, shape, dtype, quantize, **case)
        return {} if entry is None else {"goal": entry.goal, "published": dict(entry.peers)}


def _rounded(content: Any) -> Any:
    """With six digits."""
    match content:
        case float():
            return float(f"{content:.6g}")
        case dict():
            return {name: _rounded(value) for name, value in content.items()}
        case list() | tuple():
            return [_rounded(value) for value in content]
    return content


def read_report(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Facts and rows of a file.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise ValueError(f"it has version {content['version']!r}")
        return dict(content["facts"]), [Row(**row) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r} is no file that `headrace bench --json` of this version wrote ({error}); measure again, or "
            "give another one.",
            param="file",
        ) from None


def report_lines(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Everything for a terminal: facts, a table for each measurement, what failed, where published figures are from."""
    told = ", ".join(f"{name} {_fact(value)}" for name, value in facts.items() if not isinstance(value, Mapping))
    lines = textwrap.wrap(told, 118)
    for title in dict.fromkeys(row.title for row in rows):
        group = [row for row in rows if row.title == title]
        lines += ["", f"{title} ({group[0].unit})", *_table(group)]
    lines += _failures(rows)
    if any(row.published for row in rows):
        lines += ["", f"Figures with * were measured elsewhere: on one {DEVICE}, {DATE}."]
    return lines


def _fact(value: Any) -> str:
    return amount(value) if isinstance(value, float) else str(value)


def _table(rows: Sequence[Row]) -> list[str]:
    case = [name for name in _CASE if any(name in row.case for row in rows)]
    subjects = list(dict.fromkeys(name for row in rows for name in row.figures))
    more = [name for name in _details(rows) if any(name in _own(row) for row in rows)]
    peers = list(dict.fromkeys(name for row in rows for name in row.published))
    limits, goals = any(row.limit for row in rows), any(row.goal for row in rows)
    heads = ["model", "dtype", *(_CASE[name] for name in case), *subjects[:1], *map(_short, more), *subjects[1:]]
    heads += ["limit" if rows[0].more_is_better else "floor", "of it"] if limits else []
    heads += ["goal", ""] if goals else []
    heads += [f"{name}*" for name in peers]
    cells = []
    for row in rows:
        dtype = f"{row.dtype}, {row.quantize}" if row.quantize else row.dtype
        line = [row.model, dtype, *(str(row.case.get(name, "-")) for name in case)]
        line += [_cell(row, name) for name in subjects[:1]]
        line += [amount(_own(row).get(name)) for name in more]
        line += [_cell(row, name) for name in subjects[1:]]
        line += [amount(row.limit), _share(row)] if limits else []
        line += [amount(row.goal), verdict(row)] if goals else []
        cells.append(line + [span(row.published.get(name)) for name in peers])
    return table(heads, cells)


def _details(rows: Sequence[Row]) -> tuple[str, ...]:
    """What a measurement shows of ours besides its figure."""
    shown = {
        "latency": ("first_token_ms", "tokens_per_s"),
        "decode": ("p99_ms",),
        "prefill": ("first_token_ms",),
        "serve": tuple(f"{name}_p{share}_ms" for name in ("ttft", "tpot", "itl", "e2e") for share in (50, 99)),
        "compare": ("in_process",),
        "startup": tuple(f"{name}_s" for name in PHASES),
    }
    return shown.get(rows[0].measure.partition(" ")[0], ())


def _short(name: str) -> str:
    words = name.split("_")
    unit = words.pop()
    return f"{' '.join(words)} {unit}" if unit in ("ms", "s") else name.replace("_", " ")


def _cell(row: Row, subject: str) -> str:
    if subject not in row.figures:
        return "-"
    value = row.value(subject)
    return "failed" if value is None else amount(value)


def _own(row: Row) -> dict[str, Any]:
    """What is said more of: ours, or the only one there is."""
    return row.figures.get(OURS) or next(iter(row.figures.values()), {})


def _share(row: Row) -> str:
    """How near to the limit ours is: 100% is at it."""
    value = row.value(OURS)
    if not value or not row.limit:
        return "-"
    return f"{value / row.limit if row.more_is_better else row.limit / value:.0%}"


def verdict(row: Row) -> str:
    """Whether ours meets the goal, and by how much."""
    value = row.value(OURS)
    if row.goal is None:
        return "-"
    if value is None:
        return "not measured"
    off = value / row.goal - 1
    met = off >= 0 if row.more_is_better else off <= 0
    return f"{'met' if met else 'missed'} ({off:+.0%})"


def _failures(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        for subject, figure in row.figures.items():
            if "error" in figure:
                load = ", ".join(f"{_CASE[name]} {value}" for name, value in row.case.items() if name in _CASE)
                lines.append(f"{row.measure} of {row.name} ({load}) by {subject}: {figure['error']}")
    return ["", *lines] if lines else []


def span(value: Value | Sequence[float] | None) -> str:
    """A figure, or a range of figures."""
    if isinstance(value, Sequence):
        return "-".join(amount(end) for end in value)
    return amount(value)


def amount(value: float | None) -> str:
    """A number with as many digits as mean something."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}"
