"""`headrace broker`: only the broker, in this process, until a signal."""

from __future__ import annotations

from typing import Any

import click

from headrace.scripts.options import command, option
from headrace.scripts.shared import client_endpoint_option, worker_endpoint_option
from headrace.scripts.terminal import Terminal

__all__ = ["broker"]


@command(
    "broker",
    "headrace broker",
    "headrace broker --endpoint tcp://127.0.0.1:5550 --worker-endpoint tcp://127.0.0.1:5551",
)
@client_endpoint_option
@worker_endpoint_option
@option(
    "--max-num-queued-reqs",
    "max_queued_requests",
    heading="Limits",
    metavar="N",
    type=click.IntRange(min=1),
    default=1024,
    help="Most requests that may wait for a worker group; more are refused as overloaded.",
)
@option(
    "--max-num-queued-tokens",
    "max_queued_tokens",
    heading="Limits",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Most prompt tokens that may wait per model. Default: 8 times what its groups' KV caches hold.",
)
@option(
    "--progress-timeout",
    heading="Limits",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=60.0,
    help="A group that has work but made no step for longer is given up, and its streams go on elsewhere.",
)
def broker(endpoint: str | None, worker_endpoint: str | None, **limits: Any) -> None:
    """Run only the broker: the queue between clients and worker groups.

    Start worker groups (`headrace workers`) and a gateway (`headrace gateway`) beside it, in any order. SIGTERM and
    Ctrl-C end it; clients and groups come back when it does.
    """
    from headrace.addresses import client_endpoint
    from headrace.addresses import worker_endpoint as default_worker_endpoint
    from headrace.broker.config import BrokerConfig
    from headrace.broker.serve import BrokerServer
    from headrace.scripts.signals import stop_on_signals

    terminal = Terminal()
    server = BrokerServer(
        endpoint or client_endpoint(), worker_endpoint or default_worker_endpoint(), BrokerConfig(**limits)
    )
    with server, stop_on_signals(server.stop):
        terminal.say(f"broker ready: clients {server.client_endpoint}, workers {server.worker_endpoint}")
        server.run()
