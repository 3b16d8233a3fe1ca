"""How many tokens a second go through one broker process, and how much later they arrive than without it.

    python -m benchmarks.broker                what the bars are held against
    python -m benchmarks.broker --json FILE    the same, also for machines

Throughput: echo groups send as fast as the broker takes it, 64 streams of one token per step, clients confirm what they
read as the library does. Latency: at a steady pace, from the leader's send to the client's receive; the same messages
at the same pace over a bare DEALER-to-ROUTER connection are the baseline, and the difference is what the broker adds.
Several short runs each: the best shows what the code can do, the median what this machine gave.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks import echo
from headrace.processes import Child

_PATIENCE = 60.0
BARS = {"tokens_per_second": 200_000, "added_ms_p50": 1.5}


@click.command()
@click.option("--streams", default=64, show_default=True, help="Streams that run at once.")
@click.option("--groups", default=1, show_default=True, help="Worker groups, a process each.")
@click.option("--clients", default=1, show_default=True, help="Clients, a process each.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of one run.")
@click.option("--runs", default=5, show_default=True, help="Runs of each measurement.")
@click.option("--pace-ms", default=10.0, show_default=True, help="Time between two steps when latency is measured.")
@click.option("--transport", type=click.Choice(["ipc", "tcp"]), default="ipc", show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
def main(json_file: Path | None, **settings: Any) -> None:
    """Measure one broker process."""
    results = {"machine": _machine(), "settings": settings, "bars": BARS}
    results["throughput"] = throughput = _throughput(**settings)
    for row in throughput:
        click.echo(
            f"throughput  {row['tokens_per_second']:>10,.0f} tokens/s   broker {row['broker_cpu']:4.0%} of a core, "
            f"{row['cpu_us_per_token']:.2f} us a token"
        )
    results["latency"] = latency = _latency(**settings)
    for row in latency:
        click.echo(
            f"latency     through {row['through_ms_p50']:.3f} / {row['through_ms_p99']:.3f} ms   "
            f"direct {row['direct_ms_p50']:.3f} / {row['direct_ms_p99']:.3f} ms   "
            f"added {row['added_ms_p50']:.3f} / {row['added_ms_p99']:.3f} ms   (p50 / p99)"
        )
    results["summary"] = summary = _summary(throughput, latency)
    for name, bar in BARS.items():
        best, median = summary[name]["best"], summary[name]["median"]
        holds = best >= bar if name == "tokens_per_second" else best <= bar
        click.echo(f"{name:18} best {best:,.3f}   median {median:,.3f}   bar {bar:,}   {'met' if holds else 'MISSED'}")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


def _throughput(streams: int, seconds: float, runs: int, pace_ms: float, **settings: Any) -> list[dict[str, float]]:
    rows = []
    with _broker(streams, 0.0, **settings) as (broker, readers):
        process = psutil.Process(broker.pid)
        for _ in range(runs):
            before, started = process.cpu_times(), time.monotonic()
            tokens = sum(answer["tokens"] / answer["seconds"] for answer in _measure(readers, seconds))
            after, elapsed = process.cpu_times(), time.monotonic() - started
            cpu = (after.user + after.system - before.user - before.system) / elapsed
            rows.append({"tokens_per_second": tokens, "broker_cpu": cpu, "cpu_us_per_token": 1e6 * cpu / tokens})
    return rows


def _latency(streams: int, seconds: float, runs: int, pace_ms: float, **settings: Any) -> list[dict[str, float]]:
    rows = []
    for _ in range(runs):  # both in turns, so that both see the same machine
        with _broker(streams, pace_ms / 1000, **settings) as (_, readers):
            through = _delays(readers, seconds)
        with _bare(streams, pace_ms / 1000, settings["transport"]) as reader:
            direct = _delays([reader], seconds)
        row = {}
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            row[f"through_ms_{name}"] = _quantile(through, share)
            row[f"direct_ms_{name}"] = _quantile(direct, share)
            row[f"added_ms_{name}"] = row[f"through_ms_{name}"] - row[f"direct_ms_{name}"]
        rows.append(row)
    return rows


@contextlib.contextmanager
def _broker(
    streams: int, pace: float, *, groups: int, clients: int, transport: str
) -> Iterator[tuple[Child, list[Child]]]:
    """A broker with its groups and its readers, once tokens flow to all of them."""
    with tempfile.TemporaryDirectory(prefix="hr") as folder, contextlib.ExitStack() as stack:
        ask = {"clients": _address(transport, folder, "c"), "workers": _address(transport, folder, "w")}
        broker = stack.enter_context(Child("bench-broker", echo.serve, ask))
        where = broker.wait_ready(_PATIENCE)
        rows = -(-streams // groups)
        for number in range(groups):
            settings = {"endpoint": where["workers"], "name": f"echo-{number}", "rows": rows, "pace": pace}
            stack.enter_context(Child(f"bench-group-{number}", echo.group, settings)).wait_ready(_PATIENCE)
        shares = [streams // clients + (number < streams % clients) for number in range(clients)]
        readers = [
            stack.enter_context(Child(f"bench-client-{n}", echo.reader, {"endpoint": where["clients"], "streams": s}))
            for n, s in enumerate(shares)
        ]
        _wait_for_flow(readers)
        yield broker, readers


@contextlib.contextmanager
def _bare(rows: int, pace: float, transport: str) -> Iterator[Child]:
    """The same messages without a broker."""
    with tempfile.TemporaryDirectory(prefix="hr") as folder, contextlib.ExitStack() as stack:
        settings = {"endpoint": _address(transport, folder, "d", port=_free_port()), "rows": rows, "pace": pace}
        reader = stack.enter_context(Child("bench-reader", echo.hop, {**settings, "sender": False}))
        reader.wait_ready(_PATIENCE)
        stack.enter_context(Child("bench-sender", echo.hop, {**settings, "sender": True}))
        _wait_for_flow([reader])
        yield reader


def _wait_for_flow(readers: list[Child]) -> None:
    for reader in readers:
        assert reader.receive(_PATIENCE) == {"kind": "flowing"}, reader
    time.sleep(0.3)


def _measure(readers: list[Child], seconds: float) -> list[dict[str, Any]]:
    for reader in readers:
        reader.send("measure", seconds=seconds)
    answers = [reader.receive(_PATIENCE + seconds) for reader in readers]
    assert all(answer is not None and answer["kind"] == "measured" for answer in answers), answers
    return [answer for answer in answers if answer is not None]


def _delays(readers: list[Child], seconds: float) -> list[int]:
    return sorted(delay for answer in _measure(readers, seconds) for delay in answer["delays"])


def _quantile(delays: list[int], share: float) -> float:
    """In milliseconds."""
    return delays[min(len(delays) - 1, int(share * len(delays)))] / 1000


def _address(transport: str, folder: str, name: str, port: int = 0) -> str:
    return f"ipc://{folder}/{name}.sock" if transport == "ipc" else f"tcp://127.0.0.1:{port}"


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _summary(throughput: list[dict[str, float]], latency: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    tokens = [row["tokens_per_second"] for row in throughput]
    summary = {"tokens_per_second": {"best": max(tokens), "median": statistics.median(tokens)}}
    for name in ("added_ms_p50", "added_ms_p99"):
        added = [row[name] for row in latency]
        summary[name] = {"best": min(added), "median": statistics.median(added)}
    return summary


def _machine() -> dict[str, Any]:
    load = psutil.getloadavg()[0]
    return {
        "cpus": psutil.cpu_count(),
        "load": load,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
