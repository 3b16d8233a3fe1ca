"""`headrace bench`: how fast it is here, beside peers and the limits of the device; `headrace.benchmarks` measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headrace.scripts.bench_options import (
    case_options,
    common_options,
    peer_options,
    profile_option,
    requests_options,
    rounds_option,
)
from headrace.scripts.options import CommandError, command, option
from headrace.scripts.shared import WORKERS_NEED, check_installed

if TYPE_CHECKING:
    from headrace.benchmarks.session import Session
    from headrace.benchmarks.shapes import Source

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
@case_options(batch=1, prompt=128, output=64, sampling=True)
@peer_options
@profile_option
def decode(**values: Any) -> None:
    """Measure decode steps: all sequences generate; the figure is the median time from step to step.

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
    "serve",
    "headrace bench serve --requests 64 --request-rate 4",
    "headrace bench serve --shape llama-8b --requests 256 --requests-at-once",
    "headrace bench serve --url http://127.0.0.1:8000/v1 --served-model-name my-model",
    short_help="Times of requests that a pool, or an HTTP endpoint, serves.",
)
@common_options()
@requests_options(requests=64, prompt=512, output=128)
@option(
    "--request-rate",
    heading="Load",
    metavar="PER_SECOND",
    type=click.FloatRange(min=0, min_open=True),
    default=4.0,
    help="Requests sent per second, at times of a Poisson process that follows from the seed.",
)
@option("--requests-at-once", heading="Load", is_flag=True, help="All of them at once, instead.")
@option(
    "--max-concurrency",
    heading="Load",
    metavar="N",
    type=click.IntRange(min=1),
    help="Most requests under way at once; others wait before they are sent. Default: no limit.",
)
@option(
    "--url",
    heading="Endpoint",
    help="Measure this server of OpenAI's API, such as http://127.0.0.1:8000/v1 of vLLM. Default: a pool of our own.",
)
@option("--served-model-name", heading="Endpoint", metavar="NAME", help="What that server calls its model. No default.")
@option(
    "--vocab-size",
    heading="Endpoint",
    metavar="N",
    type=click.IntRange(min=1),
    default=1000,
    help="Prompts for that server are of token ids below.",
)
@option(
    "--api-key",
    heading="Endpoint",
    env="HEADRACE_API_KEY",
    metavar="KEY",
    help="For that server. Default: none.",
)
def serve(**values: Any) -> None:
    """Measure requests as their client sees them: time to first token, per token, between tokens, and in all.

    Broker and worker group are processes of their own, as `headrace up` starts them; the client is the Python library.
    """
    check_installed(*WORKERS_NEED)
    import math

    from headrace.benchmarks.openai_stream import Endpoint
    from headrace.benchmarks.serving import Load, serve_endpoint, serve_source
    from headrace.benchmarks.session import opened

    url, name = values["url"], values["served_model_name"]
    if url and not name:
        raise CommandError("A server is asked for a model by name; give it with --served-model-name.")
    endpoint = Endpoint.of(url, model=name, key=values["api_key"]) if url else None
    load = Load(
        requests=values["requests"],
        prompt_tokens=values["prompt_tokens"],
        output_tokens=values["output_tokens"],
        rate=math.inf if values["requests_at_once"] else values["request_rate"],
        concurrency=values["max_concurrency"],
        seed=values["seed"],
    )
    with opened(values, limits=False) as session:
        if endpoint is not None:
            serve_endpoint(session, endpoint, load, values["vocab_size"])
            return
        for source in session.settings.sources:
            _check_generates(session, source, "serve")
            serve_source(session, source, load)


@command(
    "compare",
    "headrace bench compare",
    "headrace bench compare --shape llama-8b --requests 256 --prompt-tokens 512 --output-tokens 256",
    short_help="The same requests in process, and through broker and client.",
)
@common_options()
@requests_options(requests=64, prompt=512, output=128)
def compare(requests: int, prompt_tokens: int, output_tokens: int, **values: Any) -> None:
    """Measure what the road through broker and client costs, in tokens per second and to the first token.

    It is to keep 97% of the throughput in process, and to add at most 2 ms to the first token.
    """
    check_installed(*WORKERS_NEED)
    from headrace.benchmarks.compare import compare as measure
    from headrace.benchmarks.session import opened

    with opened(values) as session:
        for source in session.settings.sources:
            _check_generates(session, source, "compare")
            measure(session, source, requests=requests, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


@command(
    "startup",
    "headrace bench startup",
    "headrace bench startup --shape llama-8b --starts 3",
    "headrace bench startup --shape llama-8b --layers 4",
    short_help="Time from a fresh process to its first token.",
)
@common_options()
@option(
    "--starts",
    heading="Load",
    metavar="N",
    type=click.IntRange(min=1),
    default=2,
    help="Warm starts, after one that is cold: no kernel compiled, the weights not in the memory of the system.",
)
def startup(starts: int, **values: Any) -> None:
    """Measure starts: a fresh process imports, loads, warms up and gives a token. Weights of shapes are written first.

    Those of llama-8b take 16 GB of disk in the folder for temporary files; --layers keeps them small.
    """
    check_installed(*WORKERS_NEED)
    from headrace.benchmarks.session import opened
    from headrace.benchmarks.startup import startup as measure

    with opened(values, limits=False) as session:
        for source in session.settings.sources:
            measure(session, source, starts=starts)


@command(
    "all",
    "headrace bench all --json results.json",
    "headrace bench all --only decode --only prefill --budget 360 --json results.json",
    "headrace bench all --shape qwen-0.5b --device cpu",
    short_help="Everything, for the table of published figures and goals.",
)
@common_options(
    "llama-8b",
    "llama-1b",
    "gpt2-xl",
    "opt-6.7b",
    "gptj-6b",
    "pythia-6.9b",
    "bloom-7b1",
    "falcon-7b",
    "t5-3b",
    "bert-large",
)
@peer_options
@option(
    "--only",
    "parts",
    heading="Load",
    multiple=True,
    type=click.Choice(("decode", "prefill", "startup", "compare", "serve")),
    help="Only this part; may be repeated. Default: all of them, in this order.",
)
@option(
    "--budget",
    heading="Load",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="Begin nothing more after that time; what is done is kept. Default: no limit.",
)
def all_(parts: tuple[str, ...], **values: Any) -> None:
    """Measure everything: the cases of published figures for their shapes, a small case of each kind for any other."""
    check_installed(*WORKERS_NEED)
    from headrace.benchmarks.everything import PARTS, measure_everything
    from headrace.benchmarks.session import opened

    with opened(values) as session:
        measure_everything(session, [part for part in PARTS if not parts or part in parts])


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
    from headrace.benchmarks.session import opened

    with opened(values) as session:
        for source in session.settings.sources:
            _check_generates(session, source, name)
        cases = [
            Case(
                measure=name,
                source=source,
                batch=batch,
                prompt_tokens=values["prompt_tokens"],
                output_tokens=values["output_tokens"],
                rounds=rounds,
                temperature=values.get("temperature", 0.0),
                top_p=values.get("top_p", 1.0),
            )
            for source in session.settings.sources
            for batch in dict.fromkeys(values["batches"])
        ]
        session.compare(cases)


def _check_generates(session: Session, source: Source, name: str) -> None:
    """Refuse an encoder where answers are measured, and all others where texts are read."""
    if session.model(source)["generates"] is (name == "encode"):
        raise CommandError(
            f"{source.name} {'generates' if name == 'encode' else 'is an encoder and does not generate'}, so it cannot "
            f"be measured by `{name}`; give another --shape."
        )


for _command in (decode, latency, prefill, throughput, encode, serve, compare, startup, broker, all_, plot):
    bench.add_command(_command)
