"""`headrace bench`: how fast it is here, beside peers and the limits of the device; `headrace.benchmarks` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from headrace.scripts.bench_options import (
    case_options,
    common_options,
    peer_options,
    profile_option,
    requests_options,
    rounds_option,
)
from headrace.scripts.options import command, option
from headrace.scripts.shared import WORKERS_NEED, check_installed

__all__ = ["bench"]


@click.group(
    "bench",
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="What each figure means, and how to remake the tables of the documentation: docs/benchmarks.md.",
)
def bench() -> None:
    """Measure speed here, beside peers and the limits of the device."""


@command(
    "decode",
    "headrace bench decode",
    "headrace bench decode --shape llama-8b --batch 1 --batch 64 --prompt-tokens 1024 --json decode.json",
    "headrace bench decode --shape ./my-model --device cpu --no-peers",
    short_help="Time from one token to the next.",
)
@common_options()
@case_options(batch=1, prompt=128, output=64)
@peer_options
@profile_option
def decode(**values: Any) -> None:
    """Measure decode steps: all sequences generate, greedily; the figure is the median time from step to step.

    The floor is what must be read in a step (weights, head, keys and values) at the rate at which this device reads.
    """
    _measure("decode", values, rounds=1)


@command(
    "latency",
    "headrace bench latency",
    "headrace bench latency --shape qwen-0.5b --batch 1 --batch 8 --rounds 10",
    short_help="Time for whole answers.",
)
@common_options()
@case_options(batch=1, prompt=128, output=64)
@rounds_option(5)
@peer_options
@profile_option
def latency(rounds: int, **values: Any) -> None:
    """Measure whole batches: from the prompts to the last tokens, in rounds, taking turns with the peers."""
    _measure("latency", values, rounds=rounds)


@command(
    "prefill",
    "headrace bench prefill",
    "headrace bench prefill --shape llama-8b --prompt-tokens 8192",
    short_help="Prompt tokens read per second.",
)
@common_options()
@case_options(batch=1, prompt=2048, output=None)
@rounds_option(3)
@peer_options
@profile_option
def prefill(rounds: int, **values: Any) -> None:
    """Measure how fast prompts are read: from handing them over to the first token of each."""
    _measure("prefill", values | {"output_tokens": 1}, rounds=rounds)


@command(
    "throughput",
    "headrace bench throughput",
    "headrace bench throughput --shape llama-8b --requests 256",
    short_help="Tokens per second with many requests at once, in process.",
)
@common_options()
@requests_options(requests=64, prompt=512, output=256)
@rounds_option(1)
@peer_options
def throughput(requests: int, rounds: int, **values: Any) -> None:
    """Measure the engine in process: so many requests at once, until all are answered."""
    _measure("throughput", values | {"batches": (requests,)}, rounds=rounds)


@command(
    "encode",
    "headrace bench encode",
    "headrace bench encode --shape bert-large --batch 1 --batch 32 --prompt-tokens 128",
    short_help="Time for an encoder to read texts.",
)
@common_options("bert-large")
@case_options(batch=1, prompt=128, output=None)
@rounds_option(20)
@peer_options
@profile_option
def encode(rounds: int, **values: Any) -> None:
    """Measure an encoder: one pass over a batch of texts."""
    _measure("encode", values | {"output_tokens": 0}, rounds=rounds)


@command(
    "broker",
    "headrace bench broker",
    "headrace bench broker --streams 256 --clients 4 --transport tcp --json broker.json",
    short_help="Tokens through one broker process, and the time that it adds.",
)
@option("--streams", heading="Load", metavar="N", type=click.IntRange(min=1), default=64, help="Streams at once.")
@option("--groups", heading="Load", metavar="N", type=click.IntRange(1, 64), default=1, help="Groups, a process each.")
@option("--clients", heading="Load", metavar="N", type=click.IntRange(1, 64), default=1, help="Likewise.")
@option("--seconds", heading="Load", type=click.FloatRange(min=0.1), default=2.0, help="Length of one run.")
@option("--runs", heading="Load", metavar="N", type=click.IntRange(min=1), default=5, help="Of each measurement.")
@option(
    "--pace-ms",
    heading="Load",
    metavar="MS",
    type=click.FloatRange(min=0.1),
    default=10.0,
    help="Time between two steps when latency is measured.",
)
@option("--transport", heading="Load", type=click.Choice(["ipc", "tcp"]), default="ipc", help="Between the processes.")
@option(
    "--json",
    "json_path",
    heading="Output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the results there. Default: nowhere.",
)
def broker(json_path: Path | None, **settings: Any) -> None:
    """Measure one broker process with groups that compute nothing: what it can carry, and what it adds."""
    from headrace.benchmarks.broker import broker_lines, measure_broker

    results = measure_broker(**settings)
    for line in broker_lines(results):
        click.echo(line)
    if json_path is not None:
        import json

        json_path.write_text(json.dumps(results, indent=1) + "\n")


@command(
    "plot",
    "headrace bench plot results.json --folder plots",
    short_help="Make plots and tables of a JSON file.",
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option(
    "--folder",
    heading="Output",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where the pictures go.",
)
def plot(file: Path, folder: Path) -> None:
    """Show FILE, which another run wrote with --json, and make plots of it. Needs matplotlib."""
    from headrace.benchmarks.plots import plot_report
    from headrace.benchmarks.report import read_report, report_lines

    facts, rows = read_report(file)
    for line in report_lines(facts, rows):
        click.echo(line)
    folder.mkdir(parents=True, exist_ok=True)
    for path in plot_report(facts, rows, folder):
        click.echo(f"plot {path}")


def _measure(name: str, values: dict[str, Any], *, rounds: int) -> None:
    """One measurement in process, of all shapes and batches."""
    check_installed(*WORKERS_NEED)
    from headrace.benchmarks.measure import Case
    from headrace.benchmarks.measures import MEASURES
    from headrace.benchmarks.session import opened
    from headrace.errors import ConfigError

    with opened(values) as session:
        for source in session.settings.sources:
            if session.model(source)["generates"] is (MEASURES[name].task == "encode"):
                raise ConfigError(
                    f"{source.name} {'generates' if name == 'encode' else 'is an encoder and does not generate'}, so "
                    f"it cannot be measured by `{name}`; give another --shape.",
                    param="shape",
                )
        cases = [
            Case(
                measure=name,
                source=source,
                batch=batch,
                prompt_tokens=values["prompt_tokens"],
                output_tokens=values["output_tokens"],
            )
            for source in session.settings.sources
            for batch in dict.fromkeys(values["batches"])
        ]
        session.compare(cases, rounds=rounds)


for _command in (decode, latency, prefill, throughput, encode, broker, plot):
    bench.add_command(_command)
