"""One model's text side: its tokenizer and chat template. It holds no state of any request.

Prompts are tokenized as they are, special tokens included: whoever writes a raw prompt writes all of it. Chats are
rendered by the template, and there only the template may write special tokens (see `headrace.client.markers`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.card import CHAT_TEMPLATE, TOKENIZER, ModelCard
from headrace.client.detokenizer import Detokenizer
from headrace.client.markers import Markers, check_roles
from headrace.client.template import ChatTemplate, plain
from headrace.errors import InvalidRequestError, ModelFilesError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Text"]


class Text:
    """Text to tokens and back for one model.

    Args:
        card: of the model.
        files: content by file name; TOKENIZER must be there, CHAT_TEMPLATE may be.

    Raises:
        ModelFilesError: a file cannot be used.
    """

    def __init__(self, card: ModelCard, files: Mapping[str, bytes]) -> None:
        self.card = card
        self._tokenizer = _load_tokenizer(files[TOKENIZER])
        source = _load_template(files)
        self._template = ChatTemplate(source) if source is not None else None
        self._markers = _markers(self._tokenizer, card, source or "")
        self._bytes_of = _byte_reader(self._tokenizer)

    def __repr__(self) -> str:
        return f"<Text of {self.card.name}: {self._tokenizer.get_vocab_size():,} tokens>"

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        """Token pieces, as the tokenizer writes them, and their ids."""
        return self._tokenizer.get_vocab()

    @property
    def has_template(self) -> bool:
        """Whether the model can be given messages."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True, *, limit: int | None = None) -> list[int]:
        """The tokens of a text; with `add_special_tokens` also those the model wants around it, such as a first BOS.

        Of what would be more than `limit` tokens with them, the end of the text is left out.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if limit is None or len(ids) <= limit:
            return ids
        around = self._tokenizer.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
        cut = self._tokenizer.encode(text, add_special_tokens=False)
        cut.truncate(max(0, limit - around))
        return self._tokenizer.post_process(cut, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text that the chat template makes of messages.

        Raises:
            InvalidRequestError: the model has no template, or it cannot render these messages.
        """
        chat = _messages(messages)
        check_roles(chat)
        settings = {"add_generation_prompt": add_generation_prompt, **plain(variables, "variables")}
        return self._rendered(chat, plain(tools, "tools"), settings)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The tokens of `render`, in which special tokens are the template's own and never come out of a message.

        Raises:
            InvalidRequestError: the model has no template, or it cannot render these messages.
        """
        rest = {"tools": plain(tools, "tools"), "variables": plain(variables, "variables")}
        chat, rest, mark = self._markers.mark(_messages(messages), rest)
        settings = {"add_generation_prompt": add_generation_prompt, **rest["variables"]}
        rendered = self._rendered(chat, rest["tools"], settings)
        pieces = rendered.split(mark) if mark else [rendered]
        return [token for piece in pieces for token in self._tokenizer.encode(piece, add_special_tokens=False).ids]

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A decoder for what comes after `prompt`."""
        return Detokenizer(self._tokenizer, prompt)

    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token by itself: its text, in which half a character is U+FFFD, and its exact bytes."""
        raw = self._bytes_of(token_id)
        return raw.decode("utf-8", "replace"), raw

    def _rendered(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None, settings: dict[str, Any]) -> str:
        if self._template is None:
            raise InvalidRequestError(
                f"The model {self.card.name} has no chat template; give a prompt instead of messages.",
                param="messages",
            )
        variables = {"documents": None, **self.card.special_tokens, **settings}
        return self._template.render(messages, tools, **variables)


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked copies; content given as a list of text parts becomes one string, which every template can print."""
    given: object = messages
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not messages:
        raise InvalidRequestError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}], and not empty.', param="messages"
        )
    chat: list[dict[str, Any]] = []
    for number, given_message in enumerate(messages):
        name = f"messages[{number}]"
        try:
            message = plain(given_message, name)
        except RecursionError:
            raise InvalidRequestError(f"{name} is nested too deeply.", param="messages") from None
        if not isinstance(message, dict):
            raise InvalidRequestError(f"{name} must be a map with role and content.", param="messages")
        content = message.get("content")
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            message["content"] = "".join(part["text"] for part in content)
        elif content is not None and not isinstance(content, str | list):
            raise InvalidRequestError(f"{name}.content must be a string.", param="messages")
        chat.append(message)
    return chat


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _load_tokenizer(content: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise ModelFilesError(f"The model's {TOKENIZER} cannot be read: {error}.") from error
    # Some files carry the settings of a training run; a prompt must come out whole and unpadded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_template(files: Mapping[str, bytes]) -> str | None:
    try:
        return files[CHAT_TEMPLATE].decode() if CHAT_TEMPLATE in files else None
    except UnicodeDecodeError as error:
        raise ModelFilesError(f"The model's {CHAT_TEMPLATE} is not UTF-8: {error}.") from error


def _markers(tokenizer: Tokenizer, card: ModelCard, template: str) -> Markers:
    added = tokenizer.get_added_tokens_decoder().values()
    strict = {token.content for token in added if token.special} | set(card.special_tokens.values())
    others = {
        token.content for token in added if not token.special and token.content.strip() and token.content in template
    }
    normalizer = tokenizer.normalizer
    normalized = normalizer is not None and any(token.normalized for token in added)
    return Markers(strict, others, normalize=normalizer.normalize_str if normalized else None)


class _byte_reader:  # noqa: N801  it stands for a function
    """The bytes of single tokens, which `decode` cannot tell: it shows half a character as U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: t.content.encode() for i, t in tokenizer.get_added_tokens_decoder().items()}
        kinds = set(_types(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None))
        self._letters = _byte_letters() if "ByteLevel" in kinds else {}
        self._fallback = "ByteFallback" in kinds

    def __call__(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:  # vocabularies are padded; such an id has no text
            return b""
        if self._letters and all(letter in self._letters for letter in piece):
            return bytes(self._letters[letter] for letter in piece)
        if self._fallback:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes.fromhex(piece[3:5])
            return piece.replace("\u2581", " ").encode()
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def _types(state: Any) -> Iterable[str]:
    if isinstance(state, dict):
        yield str(state.get("type"))
        for item in state.values():
            yield from _types(item)
    elif isinstance(state, list):
        for item in state:
            yield from _types(item)


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Letter -> byte of byte-level vocabularies: printable Latin-1 stands for itself, U+0100 and on for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
