"""What a measurement is: how one round is timed, what the time is worth, and the least that it could take.

Each is a value of `Measure` in a file of its own; what it times is a `Timeline`, made by any subject in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from headrace.benchmarks.costs import Cost, Costs
from headrace.benchmarks.shapes import Source

__all__ = ["Case", "Measure", "Timeline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model under one load.

    Attributes:
        measure: name of the measurement.
        source: of the model.
        batch: sequences at once.
        prompt_tokens: of each.
        output_tokens: of each.
        rounds: that are timed.
        alone: whether ours is measured without its peers.
        pause: seconds that nothing happens before each round.
        temperature: 0 takes the likeliest tokens.
        top_p: share of the probability that tokens are drawn from, where they are drawn.
    """

    measure: str
    source: Source
    batch: int
    prompt_tokens: int
    output_tokens: int
    rounds: int = 1
    alone: bool = False
    pause: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def sampling(self) -> dict[str, float]:
        """How tokens are drawn, as a subject takes it; nothing if the likeliest are taken."""
        return {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}

    @property
    def length(self) -> int:
        """Most tokens of one sequence."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """How one batch was generated, or one batch of texts read, in seconds.

    Attributes:
        total: until everything was on the host.
        first: until every sequence had its first token.
        gaps: from one step to the next, while all sequences decoded.
    """

    total: float
    first: float = 0.0
    gaps: Sequence[float] = field(default=())

    def to_wire(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One kind of measurement.

    Attributes:
        name: as in the command line.
        title: of its table.
        unit: of its figures.
        more_is_better: whether large figures are good.
        task: what a subject does in a round: generate, or encode.
        cost: what must be read and computed in the time that counts, of a case; `Costs` are the model's.
        times: the times that count, out of a round.
        figure: what a time is worth, in the unit.
        details: more about all rounds.
    """

    name: str
    title: str
    unit: str
    cost: Callable[[Costs, Case], Sequence[Cost]]
    times: Callable[[Timeline], Sequence[float]]
    figure: Callable[[Case, float], float]
    details: Callable[[Case, Sequence[Timeline]], dict[str, float]]
    more_is_better: bool = False
    task: str = "generate"
