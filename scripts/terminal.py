"""What commands write: lines, streamed text, and room for a changing line. Knows nothing of what they mean.

Results go to stdout, all else to stderr, so that a pipe gets what was asked for. Colour and changing lines are for
terminals; a file or pipe gets plain lines. An output whose reader has gone is given up, and the command goes on.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from typing import Any

__all__ = ["Terminal", "printable", "table"]

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class _Output:
    """stdout or stderr; a write that fails ends its use, not the program."""

    def __init__(self, file: Any) -> None:
        self._file: Any = None if file is None or file.closed else file
        self.is_terminal = self._file is not None and self._file.isatty()
        self.has_colour = self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        if isinstance(self._file, io.TextIOWrapper):  # a letter that the terminal cannot show is no reason to end
            self._file.reconfigure(errors="replace")

    def write(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        file, self._file = self._file, None
        self.is_terminal = False
        # What is left in its buffer would raise once more when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, file.fileno())
            os.close(null)


class _Beside:
    """stderr for somebody who draws a changing line there; other lines of the terminal make room for it."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal.err.is_terminal

    def write(self, text: str) -> int:
        self._terminal.draw(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


class Terminal:
    """Writes for one command; several threads may share it.

    Attributes:
        is_terminal: whether a person looks at stdout.
        err: the other output.
        beside: that output as a file, for a changing line.
    """

    def __init__(self) -> None:
        self._out, self.err = _Output(sys.stdout), _Output(sys.stderr)
        self._lock = threading.RLock()
        self._drawn = False  # a changing line is shown
        self._mid_line = False  # streamed text ended without a newline
        self.is_terminal = self._out.is_terminal
        self.beside: Any = _Beside(self)

    def paint(self, text: str, *looks: str) -> str:
        """The text in colour, if both outputs have it: either may get the text."""
        if not looks or not (self._out.has_colour and self.err.has_colour):
            return text
        return f"\x1b[{';'.join(_COLOURS[look] for look in looks)}m{text}\x1b[0m"

    def say(self, text: str = "") -> None:
        """A line of the result."""
        with self._lock:
            self._make_room()
            self._out.write(text + "\n")

    def note(self, text: str) -> None:
        """A line beside the result."""
        with self._lock:
            self._make_room()
            self.err.write(text + "\n")

    def stream(self, text: str) -> None:
        """A piece of text from elsewhere, as it comes; on a terminal without control characters."""
        if not text:
            return
        with self._lock:
            self._clear()
            self._out.write(printable(text) if self._out.is_terminal else text)
            self._mid_line = not text.endswith("\n")

    def end_stream(self) -> None:
        """Complete the line at which the streamed text stands."""
        with self._lock:
            if self._mid_line:
                self._out.write("\n")
                self._mid_line = False

    def draw(self, text: str) -> None:
        """Part of a changing line, or its end."""
        with self._lock:
            self.err.write(text)
            self._drawn = self.err.is_terminal and not text.endswith("\n")

    def _make_room(self) -> None:
        self._clear()
        self.end_stream()

    def _clear(self) -> None:
        if self._drawn:
            self.err.write("\r\x1b[K")
            self._drawn = False


def printable(text: str) -> str:
    """The text without what moves cursors and changes colours: models and peers may write anything."""
    return "".join(
        letter if letter in "\n\t" or not (letter < " " or "\x7f" <= letter < "\xa0") else "\ufffd" for letter in text
    )


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table: columns as wide as their widest cell, figures to the right."""
    cells = [heads, *([printable(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    right = [all(row[column][:1].isdigit() or row[column] in ("", "-") for row in rows) for column in range(len(heads))]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
