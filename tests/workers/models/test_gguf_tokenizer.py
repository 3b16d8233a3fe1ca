"""Vocabularies of GGUF files as tokenizer.json: the same text gives the same ids as by the model's own rules."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.workers.models.gguf_file import GGUFFile
from headrace.workers.models.gguf_tokenizer import Vocabulary, tokenizer_files
from headrace.workers.models.pretokenizers import PRE_TOKENIZERS, pre_tokenizer
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, VOCAB_SIZE
from tests.workers.models.tiny_gguf import (
    byte_level_tokenizer,
    sentence_piece_tokenizer,
    sentence_piece_vocabulary,
    write_gguf,
)

PROBES = (
    "hello world",
    "",
    " ",
    "   leading, trailing   ",
    "don't WE'LL 1234567 3.14\n\n\n\tx",
    "日本 😀 👍🏽 é e\u0301 \u00a0\u200b",
    "<|im_start|>user\nhi<|im_end|>",
    "\r\n\r\n  mixed \n lines",
)


def vocabulary_of(path: Path) -> Vocabulary:
    with GGUFFile(path) as file:
        return Vocabulary.from_metadata(file.metadata, path)


def files_of(path: Path) -> dict[str, bytes]:
    return tokenizer_files(vocabulary_of(path), max_length=512)


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_str(files_of(path)["tokenizer.json"].decode())


def random_texts(letters: str, count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(letters, k=rng.randrange(1, 40))) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------- byte level


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").path


def test_byte_level_ids_are_those_of_transformers(byte_level: Path) -> None:
    from transformers import AutoTokenizer

    ours = tokenizer_of(byte_level)
    theirs = AutoTokenizer.from_pretrained(byte_level.parent, gguf_file=byte_level.name)
    for text in (*PROBES, *random_texts("abehlo 01\n\t'.,<|>é日😀-", 300)):
        # transformers forgets that Qwen2 normalizes to NFC when it reads a GGUF file, so it gets normalized text.
        text = unicodedata.normalize("NFC", text)
        assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)


def test_byte_level_round_trip_and_special_tokens(byte_level: Path) -> None:
    tokenizer = tokenizer_of(byte_level)
    for text in PROBES:
        normalized = unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == normalized
    ids = tokenizer.encode("<|im_start|>hello<|im_end|><|endoftext|>").ids
    assert (ids[0], ids[-2], ids[-1]) == (IM_START, IM_END, END_OF_TEXT)
    assert tokenizer.decode(ids) == "hello"


def test_padding_entries_have_no_text(byte_level: Path) -> None:
    tokenizer = tokenizer_of(byte_level)
    assert tokenizer.id_to_token(VOCAB_SIZE) is None
    assert "PAD" not in tokenizer.decode([VOCAB_SIZE, ord("a")])


def test_text_files(byte_level: Path) -> None:
    files = files_of(byte_level)
    assert files["chat_template.jinja"].decode() == CHAT_TEMPLATE
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert config["model_max_length"] == 512


def test_the_result_is_what_our_client_and_transformers_load(tmp_path: Path, byte_level: Path) -> None:
    from transformers import AutoTokenizer

    from headrace.card import ModelCard
    from headrace.client.text import Text

    files = files_of(byte_level)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    card = ModelCard(name="tiny", architecture="", family="", fingerprint="", vocab_size=VOCAB_SIZE, max_model_len=512)
    messages = [{"role": "user", "content": "hello <|im_end|> 日本"}]
    ours = Text(card, files)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("hello <|im_end|> 日本") == theirs("hello <|im_end|> 日本")["input_ids"]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.render(messages) == rendered
    assert ours.encode_chat(messages).count(IM_END) == 2  # the system's and the user's, none out of the message


def test_without_a_template_there_is_no_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tokenizer=lambda writer: byte_level_tokenizer(writer, template=None)).path
    assert "chat_template.jinja" not in files_of(path)


def test_bos_is_put_first_where_the_file_or_the_rule_says_so(tmp_path: Path) -> None:
    def tokenizer(name: str, **keys: bool) -> Tokenizer:
        def write(writer) -> None:
            byte_level_tokenizer(writer, pre=name)
            for key, value in keys.items():
                getattr(writer, key)(value)

        return tokenizer_of(write_gguf(tmp_path / f"{name}{len(keys)}.gguf", tokenizer=write).path)

    plain = tokenizer("qwen2").encode("hello").ids
    assert tokenizer("llama-bpe").encode("hello").ids == [END_OF_TEXT, *plain]
    assert tokenizer("llama-bpe", add_add_bos_token=False).encode("hello").ids == plain
    both = tokenizer("qwen2", add_add_bos_token=True, add_add_eos_token=True)
    assert both.encode("hello").ids == [END_OF_TEXT, *plain, IM_END]
    assert both.encode("hello", add_special_tokens=False).ids == plain


# --------------------------------------------------------------------------------------------------------------- rules

# The published rules of GPT-2, Llama 3 and Qwen2, written for another engine of regular expressions.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
LETTERS = "abIL'stREve 0189\n\r\t.,!?<|>_-éßÀ日本ж😀\u0301\u00a0\u2028½"


def cuts(name: str, text: str) -> list[str]:
    from tokenizers import decoders, pre_tokenizers

    splitter = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": PRE_TOKENIZERS[name].to_json(),
                "model": {"type": "BPE", "vocab": {}, "merges": []},
            }
        )
    ).pre_tokenizer
    assert isinstance(splitter, pre_tokenizers.PreTokenizer)
    return [decoders.ByteLevel().decode([piece]) for piece, _ in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize(("name", "rule"), [("gpt-2", GPT2), ("llama-bpe", LLAMA3), ("qwen2", QWEN2)])
def test_rules_cut_as_published(name: str, rule: str) -> None:
    for text in (*PROBES, *random_texts(LETTERS, 500)):
        assert cuts(name, text) == regex.findall(rule, text), repr(text)


def test_digits() -> None:
    assert cuts("qwen2", "a 12345") == ["a", " ", "1", "2", "3", "4", "5"]
    assert cuts("llama-bpe", "a 12345") == ["a", " ", "123", "45"]
    assert cuts("gpt-2", "a 12345") == ["a", " 12345"]
    assert cuts("smollm", "a 123") == ["a", " ", "1", "2", "3"]
    assert cuts("tekken", "aB 12") == ["a", "B", " ", "1", "2"]


def test_a_piece_that_is_a_token_needs_no_merges_by_the_rule_of_llama3(tmp_path: Path) -> None:
    def write(writer) -> None:
        byte_level_tokenizer(writer, pre="llama-bpe")

    tokenizer = tokenizer_of(write_gguf(tmp_path / "tiny.gguf", tokenizer=write).path)
    assert json.loads(tokenizer.to_str())["model"]["ignore_merges"] is True


def test_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'llama-bpe2'.*nearest known one is 'llama-bpe'"):
        pre_tokenizer("llama-bpe2", "model.gguf")


# ------------------------------------------------------------------------------------------------------ SentencePiece


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, "llama", tokenizer=sentence_piece_tokenizer).path


def best_first(text: str) -> list[int]:
    """SentencePiece's own algorithm: as long as two neighbours make a piece, join the pair with the best score."""
    tokens, scores, _ = sentence_piece_vocabulary()
    ids = {token: number for number, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (-scores[ids[left + right]], place)
            for place, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in ids
        ]
        if not pairs:
            break
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def test_sentence_piece_ids_are_those_of_the_algorithm(sentence_piece: Path) -> None:
    tokenizer = tokenizer_of(sentence_piece)
    for text in (*random_texts("thehlowrdaing  is.,\né日本😀Z", 400), *random_texts("helo wrd", 400)):
        assert tokenizer.encode(text).ids == [1, *best_first(text)], repr(text)


def test_sentence_piece_round_trip(sentence_piece: Path) -> None:
    tokenizer = tokenizer_of(sentence_piece)
    for text in ("hello world", "  two  spaces ", "bytes: 😀\u0000\u0301", "the and\nis", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<s>hello</s>", add_special_tokens=False).ids[0] == 1
    tool = sentence_piece_vocabulary()[0].index("<tool>")
    assert tool in tokenizer.encode("a<tool>b").ids
    assert "<tool>" in tokenizer.decode([tool])  # defined by the user: text, not a mark


def test_sentence_piece_ids_are_those_of_transformers(sentence_piece: Path) -> None:
    from transformers import AutoTokenizer

    ours = tokenizer_of(sentence_piece)
    theirs = AutoTokenizer.from_pretrained(sentence_piece.parent, gguf_file=sentence_piece.name)
    # Not with a leading space: there transformers leaves out the space that SentencePiece puts before every text.
    for text in ("hello world", "the hello and", "bytes: 😀", "a\nb", "is  it"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]


def test_text_without_a_space_before_it(tmp_path: Path) -> None:
    def write(writer) -> None:
        sentence_piece_tokenizer(writer)
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(False)

    tokenizer = tokenizer_of(write_gguf(tmp_path / "tiny.gguf", "llama", tokenizer=write).path)
    tokens, _, _ = sentence_piece_vocabulary()
    assert tokenizer.encode("lo").ids == [tokens.index("lo")]
    assert tokenizer.decode(tokenizer.encode(" lo").ids) == " lo"


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "2 entries in tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.merges": ["no-pair"]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["un known"]}, "No tokenizer can be made"),
    ],
)
def test_damaged_vocabularies_are_refused(byte_level: Path, change: dict, words: str) -> None:
    with GGUFFile(byte_level) as file:
        metadata = file.metadata | change
    with pytest.raises(ModelFilesError, match=words):
        tokenizer_files(Vocabulary.from_metadata(metadata, byte_level), max_length=512)
