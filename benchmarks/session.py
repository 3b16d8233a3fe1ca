"""One run of `headrace bench`: what was asked for, the device as it was found, the report, what is shown at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from headrace.benchmarks.comparison import Comparison, Surveyor
from headrace.benchmarks.measure import Case
from headrace.benchmarks.report import Report, report_lines
from headrace.benchmarks.shapes import SHAPES, Source, find_source
from headrace.benchmarks.subject import OURS, usual_peers
from headrace.benchmarks.traces import kernel_lines
from headrace.benchmarks.worker import OrderError
from headrace.errors import ConfigError, InternalError
from headrace.scripts.terminal import Terminal
from headrace.workers.rank_threads import cores, share_of

__all__ = ["Session", "Settings", "opened"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all measurements of one run have in common.

    Attributes:
        sources: the models.
        device: cpu, cuda, cuda:N or auto.
        threads: of each process; None divides as a worker does.
        seed: of weights, prompts and arrivals.
        peers: subjects besides ours.
        eager: whether ours does without CUDA graphs.
        step_tokens: budget of one step.
        read: bytes per second that the device reads; None measures it.
        matmul: operations per second of matrix products; None measures it.
        json: file for the rows.
        plots: folder for pictures.
        traces: folder for traces of the profiler.
        budget: seconds after which nothing more is begun; None for no limit.
        limits: whether the device is measured for floors and limits.
    """

    sources: tuple[Source, ...]
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    peers: tuple[str, ...] = ()
    eager: bool = False
    step_tokens: int = 8192
    read: float | None = None
    matmul: float | None = None
    json: Path | None = None
    plots: Path | None = None
    traces: Path | None = None
    budget: float | None = None
    limits: bool = True

    @classmethod
    def of(cls, values: dict[str, Any], *, limits: bool = True) -> Settings:
        """From the values of the command's options.

        Raises:
            ConfigError: there is no such model, a folder cannot be made, or settings do not go together.
        """
        if values.get("top_p", 1.0) != 1.0 and not values["temperature"]:
            raise ConfigError(
                "--top-p is of use only where tokens are drawn; give a --temperature, too.", param="top_p"
            )
        asked = {name: values[name] for name in ("dtype", "layers", "quantize")}
        for name in ("plots", "profile"):
            if values.get(name) is not None:
                _make(values[name])
        if values["plots"] is not None:
            from headrace.benchmarks.plots import check_installed

            check_installed()  # before minutes go by
        return cls(
            sources=tuple(find_source(name, **asked) for name in dict.fromkeys(values["shapes"])),
            device=values["device"],
            threads=values["threads"],
            seed=values["seed"],
            peers=_peers(values),
            eager=values["enforce_eager"],
            step_tokens=values["max_num_batched_tokens"],
            read=_scaled(values["read_gb_s"], 1e9),
            matmul=_scaled(values["matmul_tflop_s"], 1e12),
            json=values["json_path"],
            plots=values["plots"],
            traces=values.get("profile"),
            budget=values.get("budget"),
            limits=limits,
        )


@dataclass
class Session:
    """The device, the report and the clock of one run; a context manager."""

    settings: Settings
    terminal: Terminal
    report: Report = field(init=False)
    deadline: float = field(init=False)
    _stack: contextlib.ExitStack = field(init=False, default_factory=contextlib.ExitStack)
    _folders: dict[Source, Path] = field(init=False, default_factory=dict)
    _profiles: list[dict[str, Any]] = field(init=False, default_factory=list)

    def __enter__(self) -> Session:
        settings = self.settings
        self.deadline = float("inf") if settings.budget is None else time.monotonic() + settings.budget
        # A report that cannot be written is known before anything is measured.
        self.report = Report(settings.json, {})
        surveyor = self._surveyor = self._stack.enter_context(Surveyor(settings.device, self.threads))
        try:
            self.report.facts |= self._facts()
        except OrderError as error:
            self._stack.close()
            why = f"The device cannot be measured: {error}. Is another program at work on it?"
            raise error.error or ConfigError(why, param="device") from None
        except BaseException:
            self._stack.close()
            raise
        self.report.save()
        self._comparison = Comparison(
            surveyor,
            self.report,
            peers=settings.peers,
            settings={"device": settings.device, "threads": self.threads},
            ours=self.ours,
            step_tokens=settings.step_tokens,
            seed=settings.seed,
            note=self.terminal.note,
            deadline=self.deadline,
        )
        self._stack.callback(self._comparison.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def threads(self) -> int:
        """CPU threads of each process."""
        return self.settings.threads or share_of(1, cores())

    @property
    def ours(self) -> str:
        """Which of the subjects is ours."""
        return "headrace-eager" if self.settings.eager else OURS

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.deadline

    def model(self, source: Source) -> dict[str, Any]:
        """What a source is: vocab_size, max_positions, generates, dtype."""
        found: dict[str, Any] = self.ask("model", source=asdict(source))
        return found

    def ask(self, order: str, **fields: Any) -> Any:
        """What the surveyor knows.

        Raises:
            HeadraceError: it failed.
        """
        try:
            return self._surveyor.ask(order, **fields)
        except OrderError as error:
            raise error.error or InternalError(f"The order {order!r} of the benchmark failed: {error}.") from None

    def compare(self, cases: Sequence[Case]) -> None:
        """Measure cases, in process, model by model."""
        for source in dict.fromkeys(case.source for case in cases):
            own = [case for case in cases if case.source == source]
            try:
                self._profiles += self._comparison.run(own, trace=self.settings.traces)
            except OrderError as error:  # of the surveyor; what subjects cannot do costs their rows
                raise error.error or InternalError(f"{source.name} cannot be measured: {error}.") from None

    def release(self) -> None:
        """Leave the device to others: nothing that was measured in process holds a model."""
        self._comparison.release()

    def folder(self, source: Source) -> Path:
        """A folder with the model, written once if it is a shape; nothing else is on the device meanwhile.

        Weights are never quantized there; who loads them does that.
        """
        self.release()
        source = replace(source, quantize=None)
        if source.folder is not None:
            return Path(source.folder)
        if source not in self._folders:
            place = self._stack.enter_context(TemporaryDirectory(prefix="hr-bench"))
            self._folders[source] = Path(place) / source.name
            self.terminal.note(f"writing the weights of {source.name}")
            self.ask("write", source=asdict(source), folder=str(self._folders[source]), seed=self.settings.seed)
        return self._folders[source]

    def show(self) -> None:
        """The tables, what the profiler found, and the pictures."""
        say = self.terminal.say
        for line in report_lines(self.report.facts, self.report.rows):
            say(line)
        for found in self._profiles:
            say()
            say(f"{found['case']}: {found['steps']} steps, trace in {found['trace']}")
            for line in kernel_lines(found, found["work"]):
                say(line)
        if self.settings.plots is not None:
            from headrace.benchmarks.plots import plot_report

            for path in plot_report(self.report.facts, self.report.rows, self.settings.plots):
                say(f"plot {path}")

    def _facts(self) -> dict[str, Any]:
        settings = self.settings
        facts: dict[str, Any] = self._surveyor.ask("facts")
        facts |= {"seed": settings.seed, "command": " ".join(["headrace", *sys.argv[1:]])}
        if not settings.limits:
            return facts
        dtypes = sorted({self._dtype(source) for source in settings.sources})
        rates = self._surveyor.ask("ceilings", dtypes=dtypes, read=settings.read, matmul=settings.matmul)
        return facts | {
            "read GB/s": round(rates["read"] / 1e9, 1),
            "matmul TFLOP/s": ", ".join(f"{rate / 1e12:,.1f} ({name})" for name, rate in rates["matmul"].items()),
            "ceilings": rates,
        }

    def _dtype(self, source: Source) -> str:
        if source.shape is not None:
            return SHAPES[source.shape].dtype if source.dtype == "auto" else source.dtype
        return str(self._surveyor.ask("model", source=asdict(source))["dtype"])


@contextlib.contextmanager
def opened(values: dict[str, Any], *, limits: bool = True) -> Iterator[Session]:
    """A session as the command's options say; what it measured is shown at its end, however that comes.

    Raises:
        HeadraceError: a setting is wrong, or the device cannot be measured.
    """
    with Session(Settings.of(values, limits=limits), Terminal()) as session:
        try:
            yield session
        finally:
            if session.report.rows:
                session.show()


def _peers(values: dict[str, Any]) -> tuple[str, ...]:
    """Those named, or the usual ones; nobody where the command has no peers."""
    if values.get("no_peers") or "peers" not in values:
        return ()
    return tuple(values["peers"]) or usual_peers()


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {str(folder)!r} cannot be made: {error.strerror}; give another one.") from None
