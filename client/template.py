"""Renders a model's chat template as transformers does, in a sandbox: the template is a file of somebody else's.

It sees plain values only, reaches neither code nor files, and its loops are counted, so that none is endless. What it
cannot be kept from is asking for much memory on purpose; whoever serves a model answers for its files that far.

It neither tokenizes nor knows which texts are special; that is `headrace.client.text`.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from headrace.errors import InvalidRequestError, ModelFilesError

__all__ = ["MAX_LOOPS", "MAX_RENDERED", "ChatTemplate", "plain"]

MAX_RENDERED = 8 << 20  # characters
MAX_LOOPS = 1_000_000  # turns of all loops and calls of all macros together
_MAX_SECONDS = 10.0
_COUNTER = " loops"  # no template can name a variable so


class ChatTemplate:
    """A compiled chat template.

    Raises:
        ModelFilesError: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        import jinja2

        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(_counted(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise ModelFilesError(f"The model's chat template is not valid Jinja: {error}.") from error

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, **variables: Any) -> str:
        """The prompt as text; the values must be `plain`.

        Raises:
            InvalidRequestError: the template refuses these messages, or cannot deal with them.
        """
        values = {**variables, "messages": messages, "tools": tools, _COUNTER: _counter()}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                if size > MAX_RENDERED:
                    raise InvalidRequestError(
                        f"The rendered chat exceeds {MAX_RENDERED:,} characters; send fewer or shorter messages.",
                        param="messages",
                    )
                pieces.append(piece)
        except InvalidRequestError:
            raise
        except Exception as error:  # a template may fail in any way on messages it was not written for
            raise InvalidRequestError(
                f"The model's chat template cannot render these messages: {error or type(error).__name__}. "
                "Check their roles, order and fields.",
                param="messages",
            ) from error
        return "".join(pieces)


def plain(value: Any, name: str) -> Any:
    """A copy of plain values only: a template could call the methods of anything else.

    Raises:
        InvalidRequestError: there is something that has no plain form; `name` says where.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    # What is more than a string or a number, such as an enum's member, is stripped of the rest.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key, name): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if callable(dump := getattr(value, "model_dump", None)):
        return plain(dump(), name)
    raise InvalidRequestError(
        f"{name} is {type(value).__name__}; give strings, numbers, lists and maps.", param=name.partition("[")[0]
    )


def _counter() -> Callable[[], str]:
    turns = itertools.count(1)
    until = time.monotonic() + _MAX_SECONDS

    def count() -> str:
        if next(turns) > MAX_LOOPS or time.monotonic() > until:
            raise InvalidRequestError(
                f"The model's chat template came to no end within {MAX_LOOPS:,} turns of its loops and "
                f"{_MAX_SECONDS:g} s; send fewer messages, or look at the template.",
                param="messages",
            )
        return ""

    return count


def _counted(template: Any) -> Any:
    """Make every loop and macro count its turns."""
    from jinja2 import nodes

    for node in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        counter = nodes.Getitem(nodes.ContextReference(), nodes.Const(_COUNTER), "load")
        turn = nodes.Call(counter, [], [], None, None).set_lineno(node.lineno)
        node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:  # turns that it skips are turns as well
            node.test = nodes.And(nodes.Not(turn), node.test).set_lineno(node.lineno)
    return template


@functools.cache
def _environment() -> Any:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's part for training; here it renders what it encloses."""

        tags = {"generation"}  # noqa: RUF012  the base class declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Holds what a template gives it, but no names that Python gives a meaning to."""

        def __setitem__(self, name: Any, value: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no name such as {name!r}")
            super().__setitem__(name, value)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Also looks at sums and products before they fill the memory."""

        intercepted_binops = frozenset({"+", "*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size_of(operator, left, right) > MAX_RENDERED:
                raise jinja2.exceptions.SecurityError(f"the result of {operator} would be too large")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # prompts are text, not HTML
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.globals["dict"] = lambda *values, **named: dict(*values, **named)
    environment.globals["namespace"] = Namespace
    del environment.globals["lipsum"]
    return environment


def _size_of(operator: str, left: Any, right: Any) -> float:
    """How large a result would be, in characters, entries or digits."""
    sizes = [len(value) if hasattr(value, "__len__") else None for value in (left, right)]
    if operator == "**":
        return abs(left).bit_length() * abs(right) / 3 if isinstance(left, int) and isinstance(right, int) else 0
    if operator == "+":
        return sum(size or 0 for size in sizes)
    factor = next((value for value in (left, right) if isinstance(value, int)), 1)
    return max((size * factor for size in sizes if size is not None), default=0)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes < and > for HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
