"""`headrace status`: the broker's report as tables or JSON, once or again and again."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.errors import HeadraceError
from headrace.scripts.options import CommandError, command, option
from headrace.scripts.shared import client_endpoint_option
from headrace.scripts.terminal import Terminal, printable, table

if TYPE_CHECKING:
    from headrace.client import Client

__all__ = ["status"]

_CLEAR = "\x1b[2J\x1b[H"


@command(
    "status",
    "headrace status",
    "headrace status --watch --interval 1",
    "headrace status --json | python3 -m json.tool",
)
@option("--json", "as_json", heading="Output", is_flag=True, help="The whole report as one line of JSON.")
@option("--watch", heading="Output", is_flag=True, help="Show it again and again, until Ctrl-C.")
@option(
    "--interval",
    heading="Output",
    metavar="SECONDS",
    type=float,
    default=2.0,
    help="Time between two reports of --watch, in seconds.",
)
@client_endpoint_option
def status(as_json: bool, watch: bool, interval: float, endpoint: str | None) -> None:
    """Show models, worker groups, queues and counters of a running broker.

    Ends with code 1 if no broker answers within seconds.
    """
    from headrace.client import Client

    if not 0.1 <= interval <= 3600:
        raise CommandError(f"--interval is {interval:g}; give 0.1 to 3600 seconds.")
    terminal = Terminal()
    with Client(endpoint) as client:
        if not watch:
            report = client.status()
            terminal.say(json.dumps(report, sort_keys=True) if as_json else "\n".join(describe(report)))
            return
        with contextlib.suppress(KeyboardInterrupt):
            _watch(client, terminal, interval, as_json)


def _watch(client: Client, terminal: Terminal, interval: float, as_json: bool) -> None:
    """Report after report; a broker that went away may come back."""
    before: Mapping[str, Any] | None = None
    while True:
        try:
            report = client.status()
        except HeadraceError as error:
            terminal.note(error.message)
        else:
            if as_json:
                terminal.say(json.dumps(report, sort_keys=True))
            else:
                text = "\n".join(describe(report, before))
                terminal.say(_CLEAR + text if terminal.is_terminal else text + "\n")
            before = report
        time.sleep(interval)


def describe(report: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[str]:
    """The report as lines; with an earlier one also what happened per second since then."""
    counters, requests = report.get("counters", {}), report.get("requests", {})
    lines = [
        f"broker {printable(str(report.get('broker', '?')))}, "
        f"up {_span(report.get('uptime_seconds', 0))}, {report.get('clients', 0)} connections",
        f"requests: {requests.get('live', 0)} live, {counters.get('requests_total', 0)} in all; "
        f"tokens: {counters.get('tokens_total', 0)}{_rate(report, before)}",
        "",
    ]
    models, groups = report.get("models", []), report.get("groups", [])
    if not groups:
        return [*lines, "No worker group has joined yet: start one with `headrace workers`."]
    lines += table(["MODEL", "GROUPS READY", "RUNNING", "QUEUED", "QUEUED TOKENS"], [_model(row) for row in models])
    lines += [
        "",
        *table(["GROUP", "MODEL", "STATE", "RUNNING", "KV USED", "STEPS", "HEARD"], [_group(r) for r in groups]),
    ]
    troubles = [
        f"{name.removesuffix('_total')} {', '.join(f'{key} {count}' for key, count in value.items())}"
        for name, value in counters.items()
        if isinstance(value, Mapping) and value
    ]
    return lines + (["", *map(printable, troubles)] if troubles else [])


def _model(row: Mapping[str, Any]) -> list[str]:
    return [str(row.get(key, "-")) for key in ("name", "ready_groups", "running", "queue_depth", "queue_tokens")]


def _group(row: Mapping[str, Any]) -> list[str]:
    load = row.get("load", {})
    blocks = load.get("kv_blocks_total")
    used = f"{1 - load.get('kv_blocks_free', 0) / blocks:.0%}" if blocks else "-"
    running = f"{row.get('running', 0)} of {row.get('max_num_seqs', 0)}"
    heard = f"{row.get('heartbeat_age_seconds', 0):.1f} s ago"
    return [
        str(cell)
        for cell in (row.get("name"), row.get("model"), row.get("state"), running, used, row.get("step"), heard)
    ]


def _rate(report: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    if before is None or before.get("broker") != report.get("broker"):
        return ""
    seconds = report["uptime_seconds"] - before["uptime_seconds"]
    tokens = report["counters"]["tokens_total"] - before["counters"]["tokens_total"]
    return f", {tokens / seconds:.1f} a second" if seconds > 0 else ""


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
