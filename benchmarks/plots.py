"""Pictures of a report: bars of ours and of peers, with the limit and the goal; the phases of starts; served requests.

Made of the JSON alone, so that they can be made later, elsewhere: `headrace bench plot FILE`. Needs matplotlib.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.benchmarks.published import DATE
from headrace.benchmarks.report import PHASES, Row, amount
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_installed", "plot_report"]

_OURS, _LIMIT, _GOAL = "#0b6e4f", "#222222", "#c1121f"
_PEERS = ("#8d99ae", "#b08968", "#6d597a", "#457b9d", "#bc6c25", "#7f5539")


def check_installed() -> None:
    """Refuse early.

    Raises:
        ConfigError: there is no matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "Plots need the package matplotlib, which is not installed. Install it with:  "
            'pip install "headrace[bench]"   or write --json FILE here, and make the plots where it is installed:  '
            "headrace bench plot FILE",
            param="plots",
        )


def plot_report(facts: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """One picture for each table; their files.

    Raises:
        ConfigError: there is no matplotlib.
    """
    check_installed()
    from matplotlib.figure import Figure

    paths = []
    for title in dict.fromkeys(row.title for row in rows):
        group = [row for row in rows if row.title == title and any("value" in f for f in row.figures.values())]
        if not group:
            continue
        kind = group[0].measure.partition(" ")[0]
        draw = {"startup": _phases, "serve": _served}.get(kind, _bars)
        figure = Figure(figsize=(9, 1.8 + 0.25 * _height(group, kind)), layout="constrained")
        axes = figure.subplots()
        draw(axes, group)
        axes.set_title(f"{title}\n{facts.get('device', '')}, {facts.get('date', '')}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.01)
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
        path = folder / f"{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.png"
        figure.savefig(path, dpi=150)
        paths.append(path)
    return paths


def _label(row: Row) -> str:
    case = row.case
    parts = [row.name]
    parts += [f"batch {case['batch']}"] if "batch" in case else []
    parts += [f"{case['requests']} requests"] if "requests" in case else []
    parts += [f"at {case['rate']}/s"] if "rate" in case else []
    parts += [f"prompt {case['prompt_tokens']}"] if "prompt_tokens" in case else []
    return ", ".join(parts)


def _height(group: Sequence[Row], kind: str) -> float:
    """Bars in all."""
    if kind == "startup":
        return len(group)
    if kind == "serve":
        return 8 * len(group)
    return sum(len(row.figures) + len(row.published) + 1 for row in group)


def _bars(axes: Axes, group: Sequence[Row]) -> None:
    """Rows below each other; in each, ours, the peers of this run, and, hatched, those measured elsewhere."""
    names = list(dict.fromkeys(name for row in group for name in row.figures))
    others = list(dict.fromkeys(name for row in group for name in row.published))
    colours = {
        name: _OURS if name.startswith("headrace") else _PEERS[at % len(_PEERS)] for at, name in enumerate(names)
    }
    place, ticks = 0.0, []
    seen: set[str] = set()

    def once(label: str) -> str:
        """The legend names each once."""
        fresh = label not in seen
        seen.add(label)
        return label if fresh else f"_{label}"

    for row in group:
        first = place
        values: list[tuple[str, float | None, dict[str, Any]]] = [
            (name, row.value(name), {"color": colours[name]}) for name in row.figures
        ]
        for name in others:
            found = row.published.get(name)
            if found is not None:
                edge = _PEERS[others.index(name) % len(_PEERS)]
                low = found[0] if isinstance(found, Sequence) else found
                look = {"color": "white", "edgecolor": edge, "hatch": "////"}
                values.append((f"{name} (elsewhere, {DATE})", low, look))
        for name, value, style in values:
            if value is not None:
                axes.barh(place, value, height=0.85, label=once(name), **style)
                axes.text(value, place, f" {amount(value)}", va="center", fontsize=7)
                place += 1
        ends = (first - 0.5, max(first + 0.5, place - 0.5))
        for value, colour, name in ((row.limit, _LIMIT, _limit_name(row)), (row.goal, _GOAL, "goal")):
            if value:
                axes.vlines(value, *ends, color=colour, linestyle="--", linewidth=1.2, label=once(name))
        ticks.append(((first + max(first, place - 1)) / 2, _label(row)))
        place += 1
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(group[0].unit)


def _limit_name(row: Row) -> str:
    return "limit of the device" if row.more_is_better else "floor of the device"


def _phases(axes: Axes, group: Sequence[Row]) -> None:
    """Phases behind each other."""
    for at, row in enumerate(group):
        left = 0.0
        [figure] = row.figures.values()
        for number, phase in enumerate(PHASES):
            name = phase.replace("_", " ")
            value = float(figure.get(f"{phase}_s", 0.0))
            colour = _OURS if phase == "weights" else _PEERS[number % len(_PEERS)]
            axes.barh(at, value, left=left, color=colour, label=name if at == 0 else f"_{name}")
            left += value
        axes.text(left, at, f" {amount(left)}", va="center", fontsize=7)
        if row.goal:
            axes.vlines(row.goal, at - 0.4, at + 0.4, color=_GOAL, linestyle="--", label="goal" if at == 0 else "_goal")
    axes.set_yticks(range(len(group)), [row.name for row in group], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("s")


def _served(axes: Axes, group: Sequence[Row]) -> None:
    """p50 and p99 of each time, on a scale that shows both microseconds and seconds."""
    place, ticks = 0, []
    for row in group:
        for name, figure in row.figures.items():
            for kind in ("ttft", "tpot", "itl", "e2e"):
                for share, colour in ((50, _OURS), (99, _PEERS[0])):
                    value = figure.get(f"{kind}_p{share}_ms")
                    if value:
                        label = f"p{share}" if place < 2 else f"_p{share}"
                        axes.barh(place, value, color=colour, label=label)
                        axes.text(value, place, f" {amount(value)}", va="center", fontsize=7)
                        ticks.append((place, f"{kind.upper()} p{share}, {name}, {_label(row)}"))
                        place += 1
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("ms")
