"""Renders a model's chat template as transformers does, in a sandbox: the template is a file of somebody else's.

It neither tokenizes nor knows which texts are special; that is `headrace.client.text`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from headrace.errors import InvalidRequestError, ModelFilesError

__all__ = ["MAX_RENDERED", "ChatTemplate"]

MAX_RENDERED = 8 << 20  # characters; a template in a loop must not fill the memory


class ChatTemplate:
    """A compiled chat template.

    Raises:
        ModelFilesError: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        import jinja2

        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFilesError(f"The model's chat template is not valid Jinja: {error}.") from error

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, **variables: Any) -> str:
        """The prompt as text.

        Raises:
            InvalidRequestError: the template refuses these messages, or cannot deal with them.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(messages=messages, tools=tools, **variables):
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

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  prompts are text, not HTML
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


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
