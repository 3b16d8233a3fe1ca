"""`headrace chat`: a conversation in the terminal. It keeps the history, asks the client library and prints."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from headrace.errors import ContextLengthError, HeadraceError
from headrace.sampling import SamplingParams
from headrace.scripts.answer import stream_answer
from headrace.scripts.options import command, option
from headrace.scripts.shared import client_endpoint_option
from headrace.scripts.terminal import Terminal, printable

if TYPE_CHECKING:
    from headrace.client import Client

__all__ = ["chat"]

_HELP = """\
/new             forget the conversation
/retry           answer the last message again
/system TEXT     set the system prompt and begin anew; without TEXT remove it
/set NAME VALUE  a sampling setting: temperature, top_p, top_k, min_p, max_tokens, seed, ...; no VALUE: the model's own
/model [NAME]    list the models, or change to one
/help            this list
/quit            end; so does Ctrl-D

Ctrl-C stops an answer. A line that ends with \\ goes on in the next."""


@command(
    "chat",
    "headrace chat",
    'headrace chat --system "Answer in one sentence." --temperature 0.2',
    'echo "What is a headrace?" | headrace chat --max-tokens 100',
)
@option(
    "--model", heading="Model", metavar="NAME", default="", help="Name of a served model; needless if there is one."
)
@option("--system", heading="Model", metavar="TEXT", help="System prompt.")
@option(
    "--temperature",
    heading="Sampling",
    type=float,
    help="0 takes the likeliest token, more is more varied. Default: the model's own.",
)
@option("--top-p", heading="Sampling", type=float, help="Part of the probability to choose from. Default: the model's.")
@option("--seed", heading="Sampling", type=int, help="The same seed gives the same answer. Default: another each time.")
@option(
    "--max-tokens",
    heading="Sampling",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Longest answer. Default: what the context holds.",
)
@client_endpoint_option
def chat(model: str, system: str | None, endpoint: str | None, **sampling: Any) -> None:
    """Talk to a served model in this terminal.

    Lines are messages, /help lists the commands; from a pipe, each line is a message and only answers are printed.
    """
    from headrace.client import Client

    settings = {name: value for name, value in sampling.items() if value is not None}
    SamplingParams(**settings)  # says what is wrong before the first message
    terminal = Terminal()
    with Client(endpoint) as client:
        conversation = Conversation(client, terminal, model=model, system=system, settings=settings)
        conversation.greet()
        conversation.run()


@dataclass
class Conversation:
    """One chat: its messages, its settings and what a line does to them."""

    client: Client
    terminal: Terminal
    model: str = ""
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    last: str = ""  # what was asked last, answered or not
    interactive: bool = field(default_factory=lambda: sys.stdin.isatty())

    def greet(self) -> None:
        """Find the model; a broker that does not run, or an unknown model, ends it here."""
        card = self.client.text(self.model).card
        self.model = card.name
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  lines can be edited and recalled

            about = f"{card.name}, context {card.max_model_len:,} tokens."
            self.terminal.note(f"{printable(about)} /help lists commands, Ctrl-D ends.")

    def run(self) -> None:
        """Line after line, until the end."""
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        """A message, which backslashes carry on over lines; None at the end."""
        lines: list[str] = []
        try:
            while True:
                line = input(("... " if lines else ">>> ") if self.interactive else "")
                lines.append(line.removesuffix("\\"))
                if not line.endswith("\\"):
                    return "\n".join(lines).strip()
        except EOFError:
            if self.interactive:
                self.terminal.say()
            return "\n".join(lines).strip() or None
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.terminal.note("\n(Ctrl-D or /quit ends the chat)")
            return ""

    def _answer(self, text: str) -> None:
        """Ask; message and answer become part of the conversation if there is an answer."""
        self.last = text
        head = [{"role": "system", "content": self.system}] if self.system else []
        message = {"role": "user", "content": text}
        try:
            answer = stream_answer(
                self.client,
                self.terminal,
                messages=[*head, *self.messages, message],
                model=self.model,
                settings=self.settings,
            )
        except HeadraceError as error:
            if not self.interactive:
                raise
            self.terminal.note(self.terminal.paint(error.message, "red"))
            if isinstance(error, ContextLengthError):
                self.terminal.note("/new begins a new conversation.")
            return
        if self.interactive:
            self.terminal.note(self.terminal.paint(answer.figures(), "dim"))
        self.messages += [message, {"role": "assistant", "content": answer.text}]

    def _obey(self, line: str) -> bool:
        """Do what a command says; False if the chat is to end."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                self.terminal.note(_HELP)
            case "/new":
                self._forget()
            case "/retry":
                self._retry()
            case "/system":
                self.system = rest or None
                self._forget()
            case "/set":
                self._set(*rest.partition(" ")[::2])
            case "/model":
                self._change_model(rest)
            case _:
                self.terminal.note(f"{printable(name)} is no command; /help lists them.")
        return True

    def _forget(self) -> None:
        self.messages.clear()
        self.last = ""

    def _retry(self) -> None:
        if not self.last:
            self.terminal.note("There is no message to answer yet.")
            return
        if self.messages and self.messages[-2]["content"] == self.last:
            del self.messages[-2:]
        self._answer(self.last)

    def _set(self, name: str, value: str) -> None:
        changed = {key: kept for key, kept in self.settings.items() if key != name}
        if value:
            changed[name] = _number(value.strip())
        try:
            SamplingParams(**changed)
        except HeadraceError as error:
            self.terminal.note(error.message)
        except TypeError:
            self.terminal.note(f"{name!r} is no setting; /help names some.")
        else:
            self.settings = changed
            shown = ", ".join(f"{key} {kept}" for key, kept in changed.items())
            self.terminal.note(shown or "all settings are the model's own")

    def _change_model(self, name: str) -> None:
        try:
            if name:
                self.model = self.client.text(name).card.name
            cards = self.client.models()
        except HeadraceError as error:
            self.terminal.note(error.message)
            return
        for card in cards:
            self.terminal.note(f"{'*' if card.name == self.model else ' '} {printable(card.name)}")


def _number(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
