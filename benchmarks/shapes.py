"""Models by name: the sizes of well-known checkpoints, to be filled with random values. Numbers only, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.errors import ConfigError

__all__ = ["SHAPES", "Shape", "Source", "find_source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model.

    Attributes:
        architecture: Hugging Face class name.
        dtype: of the weights, as the checkpoint is mostly used.
        sizes: fields of its config.
        layers: which of them count layers.
    """

    architecture: str
    dtype: str
    sizes: dict[str, Any]
    layers: tuple[str, ...] = ("num_hidden_layers",)

    def with_layers(self, count: int | None) -> dict[str, Any]:
        """The fields of the config, with so many layers if they are to be fewer."""
        if count is None:
            return self.sizes
        return self.sizes | {name: min(count, self.sizes[name]) for name in self.layers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from: a shape, or a folder with weights.

    Attributes:
        name: for people.
        shape: one of SHAPES, if it is one.
        folder: of the model, if it is none.
        dtype: of weights and cache.
        layers: how many a shape is cut down to; None for all.
        quantize: int8 or fp8, in which ours keeps the weights of layers; None keeps them in `dtype`.
    """

    name: str
    shape: str | None = None
    folder: str | None = None
    dtype: str = "auto"
    layers: int | None = None
    quantize: str | None = None


def _llama(dtype: str = "bfloat16", **sizes: Any) -> Shape:
    return Shape(architecture="LlamaForCausalLM", dtype=dtype, sizes={"max_position_embeddings": 131072} | sizes)


SHAPES: dict[str, Shape] = {
    "qwen-0.5b": Shape(
        architecture="Qwen2ForCausalLM",
        dtype="bfloat16",
        sizes={
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "llama-1b": _llama(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "llama-8b": _llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "gpt2-xl": Shape(
        architecture="GPT2LMHeadModel",
        dtype="float16",
        sizes={"vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024},
        layers=("n_layer",),
    ),
    "opt-6.7b": Shape(
        architecture="OPTForCausalLM",
        dtype="float16",
        sizes={
            "vocab_size": 50272,
            "hidden_size": 4096,
            "word_embed_proj_dim": 4096,
            "ffn_dim": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "gptj-6b": Shape(
        architecture="GPTJForCausalLM",
        dtype="float16",
        sizes={
            "vocab_size": 50400,
            "n_embd": 4096,
            "n_layer": 28,
            "n_head": 16,
            "rotary_dim": 64,
            "n_positions": 2048,
        },
        layers=("n_layer",),
    ),
    "pythia-6.9b": Shape(
        architecture="GPTNeoXForCausalLM",
        dtype="float16",
        sizes={
            "vocab_size": 50432,
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "bloom-7b1": Shape(
        architecture="BloomForCausalLM",
        dtype="float16",
        sizes={"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
        layers=("n_layer",),
    ),
    "falcon-7b": Shape(
        architecture="FalconForCausalLM",
        dtype="float16",
        sizes={
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
        },
    ),
    "t5-3b": Shape(
        architecture="T5ForConditionalGeneration",
        dtype="float16",
        sizes={
            "vocab_size": 32128,
            "d_model": 1024,
            "d_kv": 128,
            "d_ff": 16384,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "num_heads": 32,
            "decoder_start_token_id": 0,
        },
        layers=("num_layers", "num_decoder_layers"),
    ),
    "bert-large": Shape(
        architecture="BertModel",
        dtype="float16",
        sizes={
            "vocab_size": 30522,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "tiny": _llama(
        dtype="float32",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "tiny-t5": Shape(
        architecture="T5ForConditionalGeneration",
        dtype="float32",
        sizes={
            "vocab_size": 300,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        layers=("num_layers", "num_decoder_layers"),
    ),
    "tiny-bert": Shape(
        architecture="BertModel",
        dtype="float32",
        sizes={
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    ),
}


def find_source(name: str, *, dtype: str = "auto", layers: int | None = None, quantize: str | None = None) -> Source:
    """The shape of that name, else the model: a folder, a .gguf file or an id, which is fetched if need be.

    Raises:
        ModelError: it is neither, or damaged.
        ConfigError: layers were given for a model that has its own.
    """
    if (shape := SHAPES.get(name)) is not None:
        dtype = shape.dtype if dtype == "auto" else dtype
        return Source(name=name, shape=name, dtype=dtype, layers=layers, quantize=quantize)
    if layers is not None:
        raise ConfigError(
            f"layers is {layers}, but {name!r} is a model with weights, which is measured as it is; leave --layers "
            f"out, or give one of the shapes: {', '.join(SHAPES)}.",
            param="layers",
        )
    from headrace.errors import ModelError
    from headrace.workers.models import model_name, resolve

    try:
        folder = resolve(name)
    except ModelError as error:
        raise type(error)(
            f"{name!r} is none of the shapes ({', '.join(SHAPES)}), and as a model: {error.message}", param="shape"
        ) from error
    return Source(name=model_name(name, folder), folder=str(folder), dtype=dtype, quantize=quantize)
