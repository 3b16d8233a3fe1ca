"""The weights of a GGUF file as bfloat16 in Hugging Face's names and layout, one piece of a tensor at a time.

At most one piece is in memory, in its stored form, as float32 and as bfloat16; a piece is a few million elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.workers.models.gguf_config import Architecture
from headrace.workers.models.gguf_file import GGUFFile, GGUFTensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Weight", "optional_biases", "plan", "read_bfloat16", "read_floats", "same_matrix"]

PIECE_ELEMENTS = 4 << 20
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# GGUF name inside a block -> name inside a layer, and its shape as names of sizes.
_LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", ("hidden",)),
    "attn_q.weight": ("self_attn.q_proj.weight", ("q", "hidden")),
    "attn_q.bias": ("self_attn.q_proj.bias", ("q",)),
    "attn_k.weight": ("self_attn.k_proj.weight", ("kv", "hidden")),
    "attn_k.bias": ("self_attn.k_proj.bias", ("kv",)),
    "attn_v.weight": ("self_attn.v_proj.weight", ("kv", "hidden")),
    "attn_v.bias": ("self_attn.v_proj.bias", ("kv",)),
    "attn_output.weight": ("self_attn.o_proj.weight", ("hidden", "q")),
    "attn_output.bias": ("self_attn.o_proj.bias", ("hidden",)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", ("hidden",)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", ("inner", "hidden")),
    "ffn_gate.bias": ("mlp.gate_proj.bias", ("inner",)),
    "ffn_up.weight": ("mlp.up_proj.weight", ("inner", "hidden")),
    "ffn_up.bias": ("mlp.up_proj.bias", ("inner",)),
    "ffn_down.weight": ("mlp.down_proj.weight", ("hidden", "inner")),
    "ffn_down.bias": ("mlp.down_proj.bias", ("hidden",)),
}
_MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One weight of the result.

    Attributes:
        name: in the result.
        source: in the GGUF file.
        rope_heads_of: rows of one head, if its rows are interleaved for rotary embedding; else 0.
    """

    name: str
    source: GGUFTensor
    rope_heads_of: int = 0


def optional_biases(file: GGUFFile) -> frozenset[str]:
    """Which of the biases that some models of an architecture have are in the file: "attention", "mlp"."""
    found = {"attention"} if "blk.0.attn_q.bias" in file.tensors else set()
    return frozenset(found | ({"mlp"} if "blk.0.ffn_up.bias" in file.tensors else set()))


def plan(file: GGUFFile, architecture: Architecture, config: Mapping[str, Any]) -> list[Weight]:
    """All weights of the result, in its order.

    Raises:
        ModelFilesError: one is missing or has another shape than the settings say.
        UnsupportedModelError: the file has weights that the architecture does not know.
    """
    left = dict(file.tensors)
    left.pop(_ROPE_FACTORS, None)
    sizes = _sizes(config)
    weights = []

    def take(source: str, name: str, shape: tuple[str, ...]) -> None:
        tensor = left.pop(source, None)
        expected = tuple(sizes[size] for size in shape)
        if tensor is None:
            raise ModelFilesError(f"{file.path} has no {source!r}; the file is incomplete, get it again.")
        if tensor.shape != expected:
            raise ModelFilesError(
                f"{file.path} contradicts itself: {source!r} has the shape {list(tensor.shape)}, "
                f"but by its settings it should be {list(expected)}."
            )
        permuted = architecture.permuted_rope and source.split(".")[2:3] in (["attn_q"], ["attn_k"])
        weights.append(Weight(name=name, source=tensor, rope_heads_of=sizes["head"] if permuted else 0))

    take(_finer_embedding(left, tied=config["tie_word_embeddings"]), "model.embed_tokens.weight", ("vocab", "hidden"))
    for layer in range(config["num_hidden_layers"]):
        for part, (name, shape) in _LAYER.items():
            if not part.endswith(".bias") or _has_bias(part, architecture, config):
                take(f"blk.{layer}.{part}", f"model.layers.{layer}.{name}", shape)
    take("output_norm.weight", "model.norm.weight", ("hidden",))
    if not config["tie_word_embeddings"]:
        take(_HEAD, "lm_head.weight", ("vocab", "hidden"))
    if left:
        raise UnsupportedModelError(
            f"{file.path} has weights that no {architecture.class_name} has, such as {next(iter(left))!r}; "
            "Headrace cannot convert it."
        )
    return weights


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    head = config["head_dim"]
    return {
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "vocab": config["vocab_size"],
        "head": head,
        "q": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
    }


def _has_bias(part: str, architecture: Architecture, config: Mapping[str, Any]) -> bool:
    if part in _MLP_BIASES:
        return bool(config.get("mlp_bias"))
    if architecture.attention_bias:
        return part != "attn_output.bias"
    return bool(config.get("attention_bias"))


def _finer_embedding(tensors: dict[str, GGUFTensor], *, tied: bool) -> str:
    """The embedding's name; of a matrix that is stored twice, the copy with more bits, and the other is dropped."""
    embedding, head = tensors.get(_EMBEDDING), tensors.get(_HEAD)
    if not tied or embedding is None or head is None:
        return _EMBEDDING
    kept, dropped = (_HEAD, _EMBEDDING) if head.num_bytes > embedding.num_bytes else (_EMBEDDING, _HEAD)
    del tensors[dropped]
    return kept


def same_matrix(file: GGUFFile) -> bool:
    """Whether embedding and head are one matrix: stored once, or twice with no more between them than rounding.

    Two matrices that were trained apart differ by more than their own size; two quantizations of one by some percent.
    """
    import numpy as np

    embedding, head = file.tensors.get(_EMBEDDING), file.tensors.get(_HEAD)
    if head is None or embedding is None or embedding.shape != head.shape:
        return head is None
    rows = np.linspace(0, embedding.num_rows - 1, num=min(64, embedding.num_rows)).astype(int)
    pair = [
        np.concatenate([_dequantize(file, tensor, file.read_rows(tensor, int(row), 1), 1) for row in rows])
        for tensor in (embedding, head)
    ]
    return bool(np.abs(pair[0] - pair[1]).mean() < 0.25 * np.abs(pair[0]).mean())


def read_floats(file: GGUFFile, name: str = _ROPE_FACTORS) -> list[float] | None:
    """The values of a small tensor; None if the file has none of that name."""
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    values: list[float] = _dequantize(file, tensor, file.read_rows(tensor, 0, tensor.num_rows), 1).ravel().tolist()
    return values


def read_bfloat16(file: GGUFFile, weight: Weight) -> Iterator[memoryview]:
    """The weight's bytes in bfloat16, piece by piece.

    Raises:
        ModelFilesError: it holds values that are not numbers.
    """
    tensor = weight.source
    # A vector is one row of the file; its elements are the rows of a permuted bias.
    if weight.rope_heads_of and len(tensor.shape) == 1:
        pieces: Iterator[tuple[int, bytes]] = iter([(tensor.shape[0], file.read_rows(tensor, 0, 1))])
    else:
        pieces = file.blocks(tensor, PIECE_ELEMENTS, multiple_of=weight.rope_heads_of or 1)
    for rows, raw in pieces:
        values = _dequantize(file, tensor, raw, rows)
        if weight.rope_heads_of:
            values = _halves(values, weight.rope_heads_of)
        yield _to_bfloat16(values, f"{file.path}: {tensor.name}")


def _dequantize(file: GGUFFile, tensor: GGUFTensor, raw: bytes, rows: int) -> np.ndarray:
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    stored = np.frombuffer(raw, dtype=np.uint8)
    try:
        values: np.ndarray = dequantize(stored.reshape(-1, tensor.row_bytes), GGMLQuantizationType[tensor.kind])
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{file.path}: {tensor.name} is stored as {tensor.kind}, which cannot be converted; "
            "take another quantization of the model, for example Q8_0 or Q4_K_M."
        ) from None
    return values.reshape(rows, -1)


def _halves(values: np.ndarray, head: int) -> np.ndarray:
    """Rows of heads from llama.cpp's order (x0 y0 x1 y1 ...) to Hugging Face's (x0 x1 ... y0 y1 ...)."""
    return values.reshape(-1, head // 2, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)


def _to_bfloat16(values: np.ndarray, name: str) -> memoryview:
    """Rounds to nearest, ties to even, as torch does."""
    import numpy as np

    if not np.isfinite(values).all():
        raise ModelFilesError(f"{name} holds values that are not numbers; the file is damaged, get it again.")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(0x7FFF)
    rounded = (bits + (half + ((bits >> 16) & 1))) >> 16
    return memoryview(rounded.astype("<u2").tobytes())
