"""Writes tiny GGUF files of random models, as llama.cpp's converter would, and says what values are in them.

The quantizations are those of the real default model. The `gguf` package cannot make K-quants, so their blocks are
random bytes with small scales, and what they mean is what the package reads out of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.support.tiny_tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, SPECIAL_TOKENS, tiny_tokenizer_json

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, LAYERS = 256, 512, 4, 2, 64, 2
VOCAB = 352  # a few entries more than the tokenizer has, as real ones are padded

# Offsets of the 16-bit scales in a block of the K-quants.
_SCALES = {"Q4_K": (0, 2), "Q6_K": (208,)}


@dataclass
class TinyGGUF:
    """A file and the values that its tensors hold, by Hugging Face name, in Hugging Face's layout."""

    path: Path
    values: dict[str, np.ndarray] = field(default_factory=dict)


def stored(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Random data as it lies in the file, and the values it stands for."""
    quantization = gguf.GGMLQuantizationType[kind]
    if kind in _SCALES:
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        raw = rng.integers(0, 256, size=(np.prod(shape) // block, size), dtype=np.uint8)
        for offset in _SCALES[kind]:
            scales = rng.uniform(1e-5, 1e-4, size=len(raw)).astype(np.float16)
            raw[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
        raw = raw.reshape(*shape[:-1], -1)
    else:
        raw = gguf.quantize((rng.standard_normal(shape) * 0.05).astype(np.float32), quantization)
    return raw, gguf.dequantize(raw, quantization).reshape(shape)


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads in the order in which llama.cpp's converter puts them for the llama architecture."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(
    path: Path,
    architecture: str = "qwen2",
    *,
    head: str = "tied",
    kinds: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> TinyGGUF:
    """Write a file.

    Args:
        path: of the file.
        architecture: "qwen2", "llama", or any other name for a file that nobody can convert.
        head: "tied" (one matrix), "twice" (the same one, quantized differently) or "own".
        kinds: quantization by GGUF name inside a block, in place of the usual ones.
        metadata: more keys, in place of the usual ones; None leaves one out.
        without: names of tensors to leave out.
        extra: more tensors.
        tokenizer: a function that writes the tokenizer's keys; by default that of a tiny byte-level one.
        seed: of the random values.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    tiny = TinyGGUF(path)
    settings: dict[str, Any] = {
        "context_length": 512,
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    }
    if architecture == "llama":
        settings |= {"rope.dimension_count": HEAD, "vocab_size": VOCAB}
    keys = {f"{architecture}.{name}": value for name, value in settings.items()} | dict(metadata or {})
    for key, value in keys.items():
        if value is not None:
            _put(writer, key, value)
    (tokenizer or byte_level_tokenizer)(writer)
    usual = {"ffn_down.weight": "Q6_K", "ffn_gate.weight": "Q4_K", "attn_v.weight": "Q8_0"} | dict(kinds or {})

    def put(name: str, hf_name: str, shape: tuple[int, ...], kind: str) -> None:
        raw, values = stored(rng, shape, kind)
        if architecture == "llama" and name.split(".")[2:3] in (["attn_q"], ["attn_k"]):
            heads = HEADS if "attn_q" in name else KV_HEADS
            raw = interleaved(raw, heads)
        if name not in without:
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        tiny.values[hf_name] = values

    for block in range(LAYERS):
        for name, (hf_name, shape) in _layer(architecture).items():
            kind = usual.get(name, "F32" if len(shape) == 1 else "Q5_0")
            put(f"blk.{block}.{name}", f"model.layers.{block}.{hf_name}", shape, kind)
    put("output_norm.weight", "model.norm.weight", (HIDDEN,), "F32")
    _put_embedding(writer, tiny, rng, head)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tiny


def _layer(architecture: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    layer: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (q, HIDDEN)),
        "attn_k.weight": ("self_attn.k_proj.weight", (kv, HIDDEN)),
        "attn_v.weight": ("self_attn.v_proj.weight", (kv, HIDDEN)),
        "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, q)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (INNER, HIDDEN)),
        "ffn_up.weight": ("mlp.up_proj.weight", (INNER, HIDDEN)),
        "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, INNER)),
    }
    if architecture == "qwen2":
        layer |= {
            "attn_q.bias": ("self_attn.q_proj.bias", (q,)),
            "attn_k.bias": ("self_attn.k_proj.bias", (kv,)),
            "attn_v.bias": ("self_attn.v_proj.bias", (kv,)),
        }
    return layer


def _put_embedding(writer: gguf.GGUFWriter, tiny: TinyGGUF, rng: np.random.Generator, head: str) -> None:
    """One matrix, or the same one in two precisions, or two."""
    values = (rng.standard_normal((VOCAB, HIDDEN)) * 0.05).astype(np.float32)

    def put(name: str, values: np.ndarray, kind: str) -> np.ndarray:
        quantization = gguf.GGMLQuantizationType[kind]
        raw = gguf.quantize(values, quantization)
        writer.add_tensor(name, raw, raw_dtype=quantization)
        return gguf.dequantize(raw, quantization)

    tiny.values["model.embed_tokens.weight"] = put("token_embd.weight", values, "Q5_0")
    if head == "twice":  # the head has more bits, so it is the one to keep
        tiny.values["model.embed_tokens.weight"] = put("output.weight", values, "Q8_0")
    if head == "own":
        other = (rng.standard_normal((VOCAB, HIDDEN)) * 0.05).astype(np.float32)
        tiny.values["lm_head.weight"] = put("output.weight", other, "Q8_0")


def _put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def byte_level_tokenizer(writer: gguf.GGUFWriter, *, pre: str = "qwen2", template: str | None = CHAT_TEMPLATE) -> None:
    """The keys of the tiny byte-level tokenizer."""
    content = json.loads(tiny_tokenizer_json())
    vocab: dict[str, int] = content["model"]["vocab"]
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])] + list(SPECIAL_TOKENS)
    types = [1] * len(vocab) + [3] * len(SPECIAL_TOKENS)
    for number in range(len(tokens), VOCAB):
        tokens.append(f"[PAD{number}]")
        types.append(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_eos_token_id(IM_END)
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_pad_token_id(END_OF_TEXT)
    if template is not None:
        writer.add_chat_template(template)


# Pieces with scores, as SentencePiece trains them: the better the score, the earlier two pieces become one.
SENTENCE_PIECES = (
    "▁t", "he", "▁the", "in", "er", "▁a", "▁w", "or", "ld", "orld", "▁world", "▁hello", "el", "lo", "ell", "llo", "▁h",
    "▁▁", "é", "日本", "ing", "an", "nd", "▁and", "is", "▁is",
)  # fmt: skip


def sentence_piece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a tiny vocabulary with byte fallback."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABC.,!?'\né日本") | set("".join(SENTENCE_PIECES)))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *([6] * 256)]
    scores = [0.0] * len(tokens)
    pieces = [piece for piece in SENTENCE_PIECES if len(piece) > 1]
    tokens += pieces
    scores += [-float(number) for number in range(len(pieces))]
    tokens += letters
    scores += [-float(len(pieces) + number) for number in range(len(letters))]
    types += [1] * (len(pieces) + len(letters))
    tokens.append("<tool>")
    types.append(4)
    scores.append(-1000.0)
    tokens += [f"<pad{number}>" for number in range(len(tokens), VOCAB)]
    types += [5] * (VOCAB - len(types))
    scores += [0.0] * (VOCAB - len(scores))
    return tokens, scores, types


def sentence_piece_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The keys of a tiny SentencePiece tokenizer."""
    tokens, scores, types = sentence_piece_vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
