"""How byte-level BPE tokenizers cut text before they merge, by the name that GGUF files give the rule.

The rules are those of the models' own tokenizers. A name that is not listed is refused: a wrong rule gives a model
that works a little worse than it should, which nobody would notice.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.errors import UnsupportedModelError

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "pre_tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """One rule.

    Attributes:
        pattern: what is cut out; None takes GPT-2's rule, which the library has built in.
        single_digits: whether digits are cut one by one first.
        normalizer: type of the Unicode normalizer, or None.
        ignore_merges: whether a piece that is a token as a whole is taken without merging.
        add_bos: whether a first BOS is put before text when the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    normalizer: str | None = None
    ignore_merges: bool = False
    add_bos: bool = False

    def to_json(self) -> dict[str, Any]:
        """The pre_tokenizer of a tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.single_digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern is not None:
            steps.append({"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False})
        steps.append(
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": self.pattern is None,
            }
        )
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _words(digits: str) -> str:
    """The rule of tiktoken's cl100k, from which the newer ones differ in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = PreTokenizer()
_LLAMA3 = PreTokenizer(pattern=_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(pattern=_words(r"\p{N}"), normalizer="NFC")
_DIGITS = PreTokenizer(single_digits=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "gigachat": _GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": PreTokenizer(pattern=_words(r"\p{N}{1,3}")),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "tekken": PreTokenizer(pattern=_TEKKEN, ignore_merges=True, add_bos=True),
}


def pre_tokenizer(name: object, path: object) -> PreTokenizer:
    """The rule of that name.

    Raises:
        UnsupportedModelError: it is not known.
    """
    if isinstance(name, str) and name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    nearest = difflib.get_close_matches(str(name), PRE_TOKENIZERS, n=1, cutoff=0.0)[0]
    raise UnsupportedModelError(
        f"{path} cuts text by the rule {name!r} (tokenizer.ggml.pre), which Headrace does not know; the nearest known "
        f"one is {nearest!r}. Take the model's safetensors files, which bring their tokenizer with them."
    )
