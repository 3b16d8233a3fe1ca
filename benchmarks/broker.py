"""How many tokens a second go through one broker process, and how much later they arrive than without it.

Throughput: echo groups send as fast as the broker takes it, 64 streams of one token per step, clients confirm what they
read as the library does. Latency: at a steady pace, from the leader's send to the client's receive; the same messages
at the same pace over a bare DEALER-to-ROUTER connection are the baseline, and the difference is what the broker adds.
Several short runs each: the best shows what the code can do, the median what this machine gave.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.benchmarks import echo
from headrace.processes import Child

__all__ = ["BARS", "broker_lines", "measure_broker"]

_PATIENCE = 60.0
BARS = {"tokens_per_second": 200_000, "added_ms_p50": 1.5}


def measure_broker(**settings: Any) -> dict[str, Any]:
    """Measure one broker process.

    Args:
        settings: streams that run at once; groups and clients, a process each; seconds of one run, runs of each
            measurement; pace_ms between two steps when latency is measured; transport, ipc or tcp.

    Returns:
        machine, settings, bars, throughput and latency (a map per run), and their summary.
    """
    throughput, latency = _throughput(**settings), _latency(**settings)
    return {
        "machine": _machine(),
        "settings": settings,
        "bars": BARS,
        "throughput": throughput,
        "latency": latency,
        "summary": _summary(throughput, latency),
    }


def broker_lines(results: dict[str, Any]) -> list[str]:
    """What was measured, for a terminal."""
    lines = []
    for row in results["throughput"]:
        lines.append(
            f"throughput  {row['tokens_per_second']:>10,.0f} tokens/s   broker {row['broker_cpu']:4.0%} of a core, "
            f"{row['cpu_us_per_token']:.2f} us a token"
        )
    for row in results["latency"]:
        lines.append(
            f"latency     through {row['through_ms_p50']:.3f} / {row['through_ms_p99']:.3f} ms   "
            f"direct {row['direct_ms_p50']:.3f} / {row['direct_ms_p99']:.3f} ms   "
            f"added {row['added_ms_p50']:.3f} / {row['added_ms_p99']:.3f} ms   (p50 / p99)"
        )
    for name, bar in BARS.items():
        best, median = results["summary"][name]["best"], results["summary"][name]["median"]
        holds = best >= bar if name == "tokens_per_second" else best <= bar
        lines.append(
            f"{name:18} best {best:,.3f}   median {median:,.3f}   bar {bar:,}   {'met' if holds else 'MISSED'}"
        )
    return lines


def _throughput(streams: int, seconds: float, runs: int, pace_ms: float, **settings: Any) -> list[dict[str, float]]:
    rows = []
    with _broker(streams, 0.0, **settings) as (broker, readers):
        for _ in range(runs):
            before, started = _cpu_seconds(broker), time.monotonic()
            tokens = sum(answer["tokens"] / answer["seconds"] for answer in _measure(readers, seconds))
            cpu = (_cpu_seconds(broker) - before) / (time.monotonic() - started)
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
    return {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_seconds(child: Child) -> float:
    """Of a running process; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
