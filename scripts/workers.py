"""`headrace workers`: only worker groups, for a broker that runs or will run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from headrace.scripts.options import command, option
from headrace.scripts.shared import (
    WORKERS_NEED,
    check_installed,
    engine_config,
    engine_options,
    model_argument,
    shutdown_option,
    worker_endpoint_option,
)
from headrace.scripts.terminal import Terminal

if TYPE_CHECKING:
    from headrace.scripts.pool import Pool

__all__ = ["workers"]


@command(
    "workers",
    "headrace workers",
    "headrace workers ./my-model --groups 2 --threads 4",
    "headrace workers --worker-endpoint tcp://127.0.0.1:5551",
)
@model_argument
@engine_options
@option(
    "--name",
    heading="Workers",
    metavar="NAME",
    help="Beginning of the groups' names, unlike any other's at the broker. Default: made from the process id.",
)
@worker_endpoint_option
@shutdown_option
def workers(model: str | None, **values: Any) -> None:
    """Run only worker groups that serve MODEL: a folder, a Hugging Face id, a .gguf file, or the default model.

    The broker may start later or restart; the groups wait for it. Groups that die are started again.
    """
    check_installed(*WORKERS_NEED)
    from headrace.addresses import client_endpoint, worker_endpoint
    from headrace.scripts.pool import Plan, Pool

    name = values["name"] or f"group-{os.getpid()}"
    plan = Plan(
        model=model,
        name=values["served_model_name"],
        config=engine_config(values),
        client_endpoint=client_endpoint(),
        worker_endpoint=values["worker_endpoint"] or worker_endpoint(),
        group_names=tuple(f"{name}-{number}" for number in range(values["groups"])),
        tensor_parallel=values["tensor_parallel"],
        threads=values["threads"],
        broker=False,
        grace=values["shutdown_timeout"],
        engine=values["engine"],
    )
    terminal = Terminal()
    raise SystemExit(Pool(plan, terminal, _Greeter(terminal)).run())


class _Greeter:
    """Says that the groups serve."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def run(self, pool: Pool) -> None:
        """One line."""
        count = len(pool.plan.group_names)
        groups = "1 group serves" if count == 1 else f"{count} groups serve"
        self._terminal.say(f"workers ready: {groups} {pool.model} at {pool.worker_endpoint}")

    def stop(self) -> None:
        """Nothing to stop."""
