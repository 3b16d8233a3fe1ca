"""Options that several commands share, and the settings made from them. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from headrace.scripts.options import CommandError, option

if TYPE_CHECKING:
    from headrace.gateway.settings import GatewaySettings
    from headrace.workers.config import EngineConfig

__all__ = [
    "GATEWAY_NEEDS",
    "WORKERS_NEED",
    "check_installed",
    "client_endpoint_option",
    "engine_config",
    "engine_options",
    "gateway_options",
    "gateway_settings",
    "model_argument",
    "shutdown_option",
    "worker_endpoint_option",
]

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# Packages of the extra `serve`, by the names under which they are imported.
WORKERS_NEED = ("torch", "transformers", "safetensors")
GATEWAY_NEEDS = ("fastapi", "uvicorn", "pydantic", "prometheus_client")

model_argument = click.argument("model", required=False)

client_endpoint_option = option(
    "--endpoint",
    heading="Network",
    env="HEADRACE_ENDPOINT",
    metavar="ADDRESS",
    help="Where the broker listens for clients: ipc:///path or tcp://127.0.0.1:PORT. "
    "Default: a socket in the runtime folder.",
)
worker_endpoint_option = option(
    "--worker-endpoint",
    heading="Network",
    env="HEADRACE_WORKER_ENDPOINT",
    metavar="ADDRESS",
    help="Where the broker listens for worker groups. Default: a socket in the runtime folder.",
)
shutdown_option = option(
    "--shutdown-timeout",
    heading="Lifetime",
    metavar="SECONDS",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    help="After Ctrl-C or SIGTERM, answers in work get this many seconds to finish. A second Ctrl-C ends at once.",
)

_COUNT = click.IntRange(min=1)

_ENGINE = (
    option(
        "--served-model-name",
        heading="Model",
        metavar="NAME",
        help="What clients call it. Default: the last part of the id, or the folder's name.",
    ),
    option(
        "--dtype",
        heading="Model",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Of weights and KV cache; auto takes the checkpoint's.",
    ),
    option(
        "--quantize",
        heading="Model",
        type=click.Choice(["int8", "fp8"]),
        help="Keep the weights of layers in 8 bits: less memory, and fewer bytes to read for each token. "
        "fp8 takes a GPU of compute capability 8.9; on a CPU it saves memory only. Default: weights in --dtype.",
    ),
    option(
        "--device",
        heading="Model",
        metavar="DEVICE",
        default="auto",
        help="cpu, cuda or cuda:N; auto takes the first GPU if there is one.",
    ),
    option(
        "--max-model-len",
        heading="Model",
        metavar="TOKENS",
        type=_COUNT,
        help="Most tokens of prompt and answer together. Default: the model's own limit, if the KV cache holds it.",
    ),
    option(
        "--groups",
        heading="Workers",
        metavar="N",
        type=click.IntRange(1, 64),
        default=1,
        help="Worker groups; each loads the model once and takes a share of the requests.",
    ),
    option(
        "--tensor-parallel-size",
        "-tp",
        "tensor_parallel",
        heading="Workers",
        metavar="N",
        type=_COUNT,
        default=1,
        help="Processes per group, which split the model among them.",
    ),
    option(
        "--threads",
        heading="Workers",
        metavar="N",
        type=click.IntRange(1, 1024),
        help="CPU threads of each worker process. Default: the cores, divided among them.",
    ),
    option(
        "--enforce-eager",
        heading="Workers",
        is_flag=True,
        help="Capture no CUDA graphs: ready a little sooner, each step slower. A CPU has none anyway.",
    ),
    option(
        "--async-scheduling/--no-async-scheduling",
        heading="Workers",
        default=None,
        help="Launch each step before the tokens, or vectors, of the last one are read. Default: on a GPU.",
    ),
    # For tests and for engines of one's own; says `module:function`, called as load_engine is.
    option("--engine", heading="Workers", default="headrace.workers.engines:load_engine", hidden=True),
    option(
        "--max-num-seqs",
        heading="Limits",
        metavar="N",
        type=_COUNT,
        default=64,
        help="Most answers that one group makes at once.",
    ),
    option(
        "--max-num-batched-tokens",
        heading="Limits",
        metavar="TOKENS",
        type=_COUNT,
        default=2048,
        help="Token budget of one step: small keeps streams even, large reads prompts faster.",
    ),
    option(
        "--kv-tokens",
        heading="Limits",
        metavar="TOKENS",
        type=_COUNT,
        help="Tokens that the KV cache of one group holds. Default: what fits; on a CPU, a part of the free memory.",
    ),
    option(
        "--gpu-memory-utilization",
        heading="Limits",
        metavar="SHARE",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.9,
        help="Share of the GPU's memory that one group may hold; what weights and steps leave is KV cache.",
    ),
    option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        "prefix_cache",
        heading="Limits",
        default=True,
        help="Whether requests share the KV cache of equal beginnings.",
    ),
)

_GATEWAY = (
    option(
        "--host",
        heading="Network",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="Address of the chat page and the HTTP API. One that others can reach needs --api-key.",
    ),
    option(
        "--port",
        heading="Network",
        metavar="PORT",
        type=click.IntRange(0, 65_535),
        default=8000,
        help="TCP port of both; 0 takes a free one.",
    ),
    option(
        "--api-key",
        "api_keys",
        heading="Security",
        env="HEADRACE_API_KEY",
        metavar="KEY",
        multiple=True,
        show_default=False,
        help="Key that the HTTP API asks for; may be repeated. Others can read command lines: prefer the variable.",
    ),
    option(
        "--allow-host",
        "allowed_hosts",
        heading="Security",
        metavar="NAME",
        multiple=True,
        show_default=False,
        help="Name under which browsers may reach the page, besides localhost; may be repeated.",
    ),
    option(
        "--allow-origin",
        "allowed_origins",
        heading="Security",
        metavar="ORIGIN",
        multiple=True,
        show_default=False,
        help="Web site (scheme://host:port) whose scripts may call the API; may be repeated.",
    ),
)


def _all(options: tuple[_Decorator, ...]) -> _Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(options):
            function = decorator(function)
        return function

    return decorate


engine_options = _all(_ENGINE)
gateway_options = _all(_GATEWAY)


def engine_config(values: dict[str, Any]) -> EngineConfig:
    """The settings of an engine, from the values of `engine_options`."""
    from headrace.workers.config import EngineConfig

    return EngineConfig(
        max_model_len=values["max_model_len"],
        max_num_seqs=values["max_num_seqs"],
        max_batch_tokens=values["max_num_batched_tokens"],
        kv_tokens=values["kv_tokens"],
        gpu_memory_utilization=values["gpu_memory_utilization"],
        prefix_cache=values["prefix_cache"],
        async_scheduling=values["async_scheduling"],
        cuda_graphs=not values["enforce_eager"],
        dtype=values["dtype"],
        quantize=values["quantize"],
        device=values["device"],
    )


def gateway_settings(values: dict[str, Any]) -> GatewaySettings:
    """The settings of a gateway, from the values of `gateway_options` and `shutdown_option`."""
    from headrace.gateway.settings import GatewaySettings

    return GatewaySettings(
        host=values["host"],
        port=values["port"],
        api_keys=tuple(values["api_keys"]),
        allowed_hosts=tuple(values["allowed_hosts"]),
        allowed_origins=tuple(values["allowed_origins"]),
        drain_timeout=values["shutdown_timeout"],
    )


def check_installed(*modules: str) -> None:
    """Refuse to serve where only the client is installed, before anything is started."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"Serving needs packages that are not installed: {', '.join(missing)}. "
            'Install them with:  pip install "headrace[serve]"   (in a checkout: scripts/quickstart does it)'
        )
