"""How our commands look and fail: options under headings with defaults and units, examples, one-message errors.

Not the options themselves: each command lists its own, and those that several share are in `headrace.scripts.shared`.

Exit codes    0    done
              1    something failed while it ran, or nobody answers
              2    an option, a setting or a model folder is wrong; the message says what to do
              130  ended by Ctrl-C; 143 by SIGTERM, without waiting for what ran
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from headrace.errors import ConfigError, HeadraceError, RequestError

__all__ = ["Command", "CommandError", "command", "option", "set_up_logging"]


class CommandError(click.ClickException):
    """An error as a person sees it: its message and nothing else."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code: int = exit_code  # type: ignore[misc]  # click allows it per instance

    @classmethod
    def of(cls, error: HeadraceError) -> CommandError:
        """Code 2 for what the person can set right in the command, 1 for the rest."""
        return cls(error.message, 2 if isinstance(error, ConfigError | RequestError) else 1)

    def show(self, file: Any = None) -> None:
        """Write the message to stderr."""
        colour = None if os.environ.get("NO_COLOR") is None else False
        click.secho("Error: ", fg="red", bold=True, err=True, nl=False, color=colour)
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
                show_envvar=True,
                help="Show tracebacks and log messages.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error becomes its message and an exit code."""
        set_up_logging()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader has gone; click ends in silence
            if ctx.meta.get("headrace.debug"):
                raise
            if isinstance(error, HeadraceError):
                raise CommandError.of(error) from None
            advice = "This should not happen; run it again with --debug for the traceback."
            raise CommandError(f"{type(error).__name__}: {error}\n{advice}", 1) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each heading with its options, in the order in which they were declared; help comes last."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):  # arguments are described by the text above
                headings.setdefault(getattr(param, "heading", "Help"), []).append(record)
        headings["Help"] = headings.pop("Help")
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


def set_up_logging() -> None:
    """Warnings and worse to stderr; everything of ours if $HEADRACE_DEBUG is set. Also called by child processes."""
    if sys.stderr is None:
        return
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if os.environ.get("HEADRACE_DEBUG"):
        logging.getLogger("headrace").setLevel(logging.DEBUG)


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
