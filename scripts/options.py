"""How our commands look: options under headings with defaults and units, examples, and clean errors.

Not the options themselves: each command lists its own, and those that several share are in `headrace.scripts.shared`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import click

from headrace.errors import HeadraceError

__all__ = ["Command", "CommandError", "command", "option"]


class CommandError(click.ClickException):
    """An error that a person caused or can mend: its message and nothing else, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Write the message to stderr."""
        click.secho("Error: ", fg="red", bold=True, err=True, nl=False)
        click.echo(self.format_message(), err=True)


class _Option(click.Option):
    """An option that knows under which heading it is listed."""

    def __init__(self, *args: Any, heading: str = "Options", **kwargs: Any) -> None:
        self.heading = heading
        super().__init__(*args, **kwargs)


class Command(click.Command):
    """A command with grouped options and examples, whose errors are one message unless --debug is given."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params.append(
            _Option(
                ["--debug"],
                heading="Help",
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_remember_debug,
                envvar="HEADRACE_DEBUG",
                help="Show tracebacks and log messages.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of the tree becomes its message and exit code 2."""
        try:
            return super().invoke(ctx)
        except HeadraceError as error:
            if ctx.meta.get("headrace.debug"):
                raise
            raise CommandError(error.message) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each heading with its options, in the order in which they were declared."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            heading = getattr(param, "heading", "Help")
            record = param.get_help_record(ctx)
            if record is not None:
                headings.setdefault(heading, []).append(record)
        for heading, records in headings.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are typed."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta["headrace.debug"] = value
    if value:
        # Child processes show theirs too.
        os.environ["HEADRACE_DEBUG"] = "1"


def command(name: str, *examples: str, **settings: Any) -> Callable[[Callable[..., Any]], Command]:
    """Declare a command; `examples` are whole command lines."""
    settings.setdefault("context_settings", {"max_content_width": 110, "help_option_names": ["-h", "--help"]})
    return click.command(name, cls=Command, examples=examples, **settings)


def option(*names: str, heading: str, env: str | None = None, **settings: Any) -> Callable[..., Any]:
    """Declare an option under a heading; `env` names the environment variable that sets it too."""
    settings.setdefault("show_default", settings.get("default") is not None)
    if env:
        settings |= {"envvar": env, "show_envvar": True}
    return click.option(*names, cls=_Option, heading=heading, **settings)
