"""The `headrace` command: finds the subcommand and imports only that one, so that help is instant.

Subcommands live in a file each; heavy parts (torch, the broker, the gateway) are imported when a command runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from headrace._version import __version__

__all__ = ["COMMANDS", "cli", "main"]

# name -> module with an attribute of the same name, and the line that `headrace --help` shows without an import.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "up": ("headrace.scripts.up", "Start everything: broker, worker groups and gateway, in one terminal."),
    "chat": ("headrace.scripts.chat", "Talk to a served model in this terminal."),
    "status": ("headrace.scripts.status", "Show groups, queues and counters of a running broker."),
    "bench": ("headrace.scripts.bench", "Measure speed here, beside peers and the limits of the device."),
    "models": ("headrace.scripts.models", "Fetch, convert, list and check models."),
    "broker": ("headrace.scripts.broker", "Run only the broker."),
    "workers": ("headrace.scripts.workers", "Run only worker groups, for a running broker."),
    "gateway": ("headrace.scripts.gateway", "Run only the HTTP API and the chat page, for a running broker."),
}


class _LazyGroup(click.Group):
    """A group whose subcommands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: Any = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command), cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if not args or args[0] in COMMANDS:
                raise
            raise click.UsageError(f"{error.message} Commands: {', '.join(COMMANDS)}.", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="Start here: `headrace up`, then open the page it names. `headrace COMMAND --help` has examples.",
)
@click.version_option(__version__, prog_name="headrace")
def cli() -> None:
    """Serve Hugging Face models to a chat page, an OpenAI client or Python: one command, nothing lost on a crash."""


def main() -> None:
    """Entry point of the installed command."""
    cli(prog_name="headrace")


if __name__ == "__main__":
    main()
