"""From GGUF metadata to config.json: which architectures we convert, and what their settings are called over there.

An architecture is a row of a table. What a row cannot express (experts, odd rotary layouts) is refused by name.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import ModelFilesError, UnsupportedModelError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "make_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one GGUF architecture maps to a Hugging Face model.

    Attributes:
        model_type: of config.json.
        class_name: of the Hugging Face model.
        permuted_rope: whether rows of query and key heads are interleaved for llama.cpp's rotary embedding.
        attention_bias: whether query, key and value have biases: always, or (None) if the file has them.
        settings: of config.json that are the same for all models of the architecture.
    """

    model_type: str
    class_name: str
    permuted_rope: bool = False
    attention_bias: bool | None = None
    settings: Mapping[str, Any]


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        permuted_rope=True,
        settings={"hidden_act": "silu"},
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        attention_bias=True,
        settings={"hidden_act": "silu", "use_sliding_window": False},
    ),
}


def architecture_of(metadata: Mapping[str, Any], path: object) -> Architecture:
    """The row of the table for a file.

    Raises:
        UnsupportedModelError: there is none, or the file uses what the row cannot express.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelFilesError(
            f"{path} does not name its architecture (general.architecture), so it cannot be converted."
        )
    if name not in ARCHITECTURES:
        nearest = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise UnsupportedModelError(
            f"{path} is of the architecture {name!r}, which Headrace cannot convert from GGUF; the nearest supported "
            f"one is {nearest!r} (supported: {', '.join(sorted(ARCHITECTURES))}). Take the model's safetensors files "
            "instead, or another model."
        )
    if metadata.get(f"{name}.expert_count", 0):
        raise UnsupportedModelError(
            f"{path} is a mixture of {metadata[f'{name}.expert_count']} experts, which Headrace cannot convert from "
            f"GGUF; the nearest supported one is a dense {name!r} model."
        )
    return ARCHITECTURES[name]


def make_config(
    metadata: Mapping[str, Any],
    path: object,
    *,
    tied: bool,
    biases: frozenset[str] = frozenset(),
    rope_factors: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        metadata: of the GGUF file.
        path: of the file, for messages.
        tied: whether embedding and head are one matrix.
        biases: which optional biases the file has: "attention", "mlp".
        rope_factors: what the file divides rotary frequencies by, if it says so by a tensor.

    Raises:
        ModelFilesError: a setting is missing or makes no sense.
        UnsupportedModelError: a setting says that the model computes something else.
    """
    architecture = architecture_of(metadata, path)
    values = _Values(metadata, path)
    hidden, heads = values.count("embedding_length"), values.count("attention.head_count")
    head_dim = values.count("attention.key_length", default=hidden // heads)
    if metadata.get(values.key("rope.dimension_count"), head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{path} rotates only a part of each head, which Headrace cannot convert from GGUF."
        )
    theta = values.number("rope.freq_base", default=10000.0)
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())) or values.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": values.count("feed_forward_length"),
        "num_hidden_layers": values.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.count("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": values.count("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **architecture.settings,
    }
    if architecture.attention_bias is None:
        config |= {"attention_bias": "attention" in biases, "mlp_bias": "mlp" in biases}
    if scaling := _rope_scaling(values, rope_factors, theta, head_dim):
        config["rope_scaling"] = scaling
    return config


class _Values:
    """Settings of the file's own architecture, checked as they are read."""

    def __init__(self, metadata: Mapping[str, Any], path: object) -> None:
        self._metadata = metadata
        self._path = path

    def key(self, name: str) -> str:
        return f"{self._metadata['general.architecture']}.{name}"

    def get(self, name: str) -> Any:
        return self._metadata.get(self.key(name))

    def count(self, name: str, default: int | None = None) -> int:
        value = self._metadata.get(self.key(name), default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedModelError(
                f"{self._path} has another {self.key(name)} in each layer, which Headrace cannot convert from GGUF."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelFilesError(
                f"{self._path} has {value!r} for {self.key(name)}; the file is incomplete or damaged."
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._metadata.get(self.key(name), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ModelFilesError(
                f"{self._path} has {value!r} for {self.key(name)}; the file is incomplete or damaged."
            )
        # Numbers are kept in 32 bits over there: what was 1e-06 comes as 9.999999974752427e-07.
        return float(f"{value:.7g}")

    def refuse_rope(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._path} scales its rotary embedding in a way ({what}) that Headrace cannot convert from GGUF; "
            "take the model's safetensors files instead."
        )


def _rope_scaling(
    values: _Values, factors: Sequence[float] | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type") or "none"
    if factors is not None and any(factor != 1.0 for factor in factors):
        return _llama3_scaling(values, factors, theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": values.number("rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": values.number("rope.scaling.factor"),
            "original_max_position_embeddings": values.count("rope.scaling.original_context_length"),
        }
    raise values.refuse_rope(str(kind))


# The published settings of the Llama 3.x family; its files carry the resulting factors, not the settings.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _llama3_scaling(values: _Values, factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": float(f"{max(factors):.7g}"), **_LLAMA3}
    expected = _llama3_factors(scaling["factor"], theta, head_dim)
    if len(expected) != len(factors) or any(abs(a - b) > 1e-3 * b for a, b in zip(factors, expected, strict=True)):
        raise values.refuse_rope("frequency factors of its own")
    return scaling


def _llama3_factors(factor: float, theta: float, head_dim: int) -> list[float]:
    low, high, context = (float(_LLAMA3[name]) for name in _LLAMA3)
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * 3.141592653589793 * theta ** (index / head_dim)
        smooth = (context / wavelength - low) / (high - low)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return [struct.unpack("<f", struct.pack("<f", value))[0] for value in factors]
