"""From the vocabulary in a GGUF file to tokenizer.json, tokenizer_config.json, the chat template and the end tokens.

Two kinds of vocabulary are known: byte-level BPE with merges ("gpt2"), and SentencePiece pieces with scores and byte
fallback ("llama"), which become merges ordered by score.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.card import CHAT_TEMPLATE, TOKENIZER
from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.workers.models.pretokenizers import PreTokenizer, pre_tokenizer

__all__ = ["Vocabulary", "tokenizer_files"]

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

# Control tokens that end an answer, whatever else the file calls the end.
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokenizer's part of a GGUF file, checked.

    Attributes:
        kind: "gpt2" or "llama".
        tokens: text by id, as the vocabulary writes it.
        types: what each token is.
        scores: of each token; empty for byte-level BPE.
        merges: pairs in order; empty for SentencePiece.
        rule: how text is cut before merging; None for SentencePiece.
        special: name -> id of the tokens with a role (bos, eos, eot, eom, unknown, padding).
        add_bos, add_eos: whether text is put between them.
        add_space_prefix: whether text gets a space before it.
        chat_template: Jinja, or None.
    """

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]]
    rule: PreTokenizer | None
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: object) -> Vocabulary:
        """Read it from the metadata of a file.

        Raises:
            ModelFilesError: a part is missing or parts contradict each other.
            UnsupportedModelError: it is of a kind that we do not convert.
        """
        get = _Getter(metadata, path)
        kind = metadata.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"{path} has a tokenizer of the kind {kind!r}; Headrace converts byte-level BPE ('gpt2') and "
                "SentencePiece ('llama'). Take the model's safetensors files, which bring their tokenizer with them."
            )
        tokens = get.list("tokens", str)
        is_bpe = kind == "gpt2"
        rule = pre_tokenizer(metadata.get("tokenizer.ggml.pre"), path) if is_bpe else None
        template = metadata.get("tokenizer.chat_template")
        return cls(
            kind=kind,
            tokens=[token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)],
            types=get.list("token_type", int, like=tokens),
            scores=() if is_bpe else get.list("scores", float, like=tokens),
            merges=[_pair(merge, path) for merge in get.list("merges", str)] if is_bpe else (),
            rule=rule,
            special=get.special_ids(len(tokens)),
            add_bos=bool(get.value("add_bos_token", rule.add_bos if rule else True)),
            add_eos=bool(get.value("add_eos_token", False)),
            add_space_prefix=bool(get.value("add_space_prefix", rule is None)),
            chat_template=template if isinstance(template, str) and template.strip() else None,
        )

    def text_of(self, role: str) -> str | None:
        """The token that has a role, if one has."""
        return self.tokens[self.special[role]] if role in self.special else None

    def end_ids(self) -> list[int]:
        """Ids that end an answer: the declared ones first, then those known by their text."""
        declared = [self.special[role] for role in ("eos", "eot", "eom") if role in self.special]
        ids = {token: number for number, token in enumerate(self.tokens) if self.types[number] == _CONTROL}
        return list(dict.fromkeys([*declared, *(ids[text] for text in _ENDS if text in ids)]))


class _Getter:
    def __init__(self, metadata: Mapping[str, Any], path: object) -> None:
        self._metadata = metadata
        self._path = path

    def value(self, name: str, default: Any) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}", default)

    def list(self, name: str, kind: type, *, like: Sequence[Any] | None = None) -> list[Any]:
        values = self.value(name, None)
        if not isinstance(values, list) or not values or not isinstance(values[0], kind):
            raise ModelFilesError(
                f"{self._path} has no usable list tokenizer.ggml.{name}; the file is incomplete or damaged."
            )
        if like is not None and len(values) != len(like):
            raise ModelFilesError(
                f"{self._path} contradicts itself: {len(values):,} entries in tokenizer.ggml.{name} "
                f"for {len(like):,} tokens."
            )
        return values

    def special_ids(self, num_tokens: int) -> dict[str, int]:
        roles = ("bos", "eos", "eot", "eom", "unknown", "padding")
        found = {role: self.value(f"{role}_token_id", None) for role in roles}
        return {role: id for role, id in found.items() if isinstance(id, int) and 0 <= id < num_tokens}


def _pair(merge: str, path: object) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelFilesError(f"{path} has the merge {merge!r}, which is not a pair; the file is damaged.")
    return left, right


def tokenizer_files(vocabulary: Vocabulary, *, max_length: int) -> dict[str, bytes]:
    """Name -> content of the files that hold the text side of the model.

    Raises:
        ModelFilesError: the vocabulary is such that no tokenizer can be made of it.
    """
    content = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _sentence_piece(vocabulary)
    tokenizer = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    _try_out(tokenizer, vocabulary)
    files = {TOKENIZER: tokenizer, "tokenizer_config.json": _config(vocabulary, max_length)}
    if vocabulary.chat_template is not None:
        files[CHAT_TEMPLATE] = vocabulary.chat_template.encode()
    return files


def _try_out(content: bytes, vocabulary: Vocabulary) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise ModelFilesError(f"No tokenizer can be made of the vocabulary in the GGUF file: {error}.") from error
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if vocabulary.tokens[number] != token.content:
            raise ModelFilesError(f"The vocabulary in the GGUF file has {token.content!r} twice; the file is damaged.")


def _config(vocabulary: Vocabulary, max_length: int) -> bytes:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    config |= {name: vocabulary.text_of(role) for name, role in roles.items()}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


# ------------------------------------------------------------------------------------------------------ tokenizer.json


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    rule = vocabulary.rule
    assert rule is not None
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": rule.ignore_merges,
        # Padding entries have no text: no merge makes them, and a model that chooses one has said nothing.
        "vocab": {
            token: number for number, token in enumerate(vocabulary.tokens) if vocabulary.types[number] != _UNUSED
        },
        "merges": [list(pair) for pair in vocabulary.merges],
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _tokenizer(
        vocabulary,
        normalizer={"type": rule.normalizer} if rule.normalizer else None,
        pre_tokenizer=rule.to_json(),
        post_processor=_around(vocabulary) or byte_level,
        decoder=byte_level,
        model=model,
    )


def _sentence_piece(vocabulary: Vocabulary) -> dict[str, Any]:
    prefix = vocabulary.add_space_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.text_of("unknown")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown if unknown is not None else _first_of(vocabulary, _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
        "merges": [list(pair) for pair in _merges_by_score(vocabulary)],
    }
    return _tokenizer(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=_around(vocabulary),
        decoder={"type": "Sequence", "decoders": decoders},
        model=model,
    )


def _tokenizer(vocabulary: Vocabulary, **parts: Any) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(_added(vocabulary)), **parts}


def _added(vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            yield {"id": number, "content": token, **flags, "special": kind != _USER_DEFINED}


def _around(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The post-processor that puts BOS and EOS around text; None if neither is wanted."""
    before = [role for role in ("bos",) if vocabulary.add_bos and role in vocabulary.special]
    after = [role for role in ("eos",) if vocabulary.add_eos and role in vocabulary.special]
    if not before and not after:
        return None
    texts = {role: vocabulary.tokens[vocabulary.special[role]] for role in (*before, *after)}

    def template(*names: str) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = []
        for number, name in enumerate(names):
            steps += [{"SpecialToken": {"id": texts[role], "type_id": number}} for role in before]
            steps.append({"Sequence": {"id": name, "type_id": number}})
            steps += [{"SpecialToken": {"id": texts[role], "type_id": number}} for role in after]
        return steps

    special = {text: {"id": text, "ids": [vocabulary.special[role]], "tokens": [text]} for role, text in texts.items()}
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": special,
    }


def _first_of(vocabulary: Vocabulary, kind: int) -> str | None:
    return next(
        (token for token, found in zip(vocabulary.tokens, vocabulary.types, strict=True) if found == kind), None
    )


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, best score first; equal scores in the order of the halves' ids."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    found = []
    for number, token in enumerate(vocabulary.tokens):
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-vocabulary.scores[number], number, left, right))
    found.sort()
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, _, left, right in found]
