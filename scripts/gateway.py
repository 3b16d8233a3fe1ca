"""`headrace gateway`: only the HTTP API and the chat page, in this process, until a signal."""

from __future__ import annotations

from typing import Any

from headrace.scripts.options import command
from headrace.scripts.shared import (
    GATEWAY_NEEDS,
    check_installed,
    client_endpoint_option,
    gateway_options,
    gateway_settings,
    shutdown_option,
)
from headrace.scripts.terminal import Terminal

__all__ = ["gateway"]


@command(
    "gateway",
    "headrace gateway",
    "headrace gateway --port 8080",
    "HEADRACE_API_KEY=$(openssl rand -hex 16) headrace gateway --host 0.0.0.0",
)
@gateway_options
@client_endpoint_option
@shutdown_option
def gateway(endpoint: str | None, **values: Any) -> None:
    """Run only the HTTP API and the chat page, for a broker that runs or will run.

    The page is at /, the API at /v1 (OpenAI's), /generate, /health, /ready and /metrics.
    """
    check_installed(*GATEWAY_NEEDS)
    settings = gateway_settings(values)
    from headrace.gateway.serve import GatewayServer
    from headrace.scripts.signals import stop_on_signals

    terminal = Terminal()
    server = GatewayServer(endpoint, settings, on_ready=lambda url: terminal.say(f"gateway ready: {url}"))
    # uvicorn takes the signals over while it serves and raises them again when it has finished.
    with stop_on_signals(server.stop):
        server.run()
