"""Models with random weights at the head sizes of real ones, and well-known models at their own sizes.

Widths are real (heads times head size), so that kernels meet the tiles they were made for; there are two layers, a
small feed-forward part and a small vocabulary, so that a model is made and run in well under a second on a GPU.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from headrace.kernels.inject import inject
from headrace.kernels.model import Model
from headrace.kernels.policies import find_policy
from tests.support.tiny_models import FAMILIES, T5_VARIANTS, make_model
from tests.support.tiny_tokenizer import VOCAB_SIZE

__all__ = ["HEAD_SIZES", "KNOWN", "injected", "make_decoder", "make_encoder", "make_known", "make_t5"]

HEAD_SIZES = (64, 80, 96, 128, 256)

# head size -> heads, and kv heads where they are fewer: GPT-2 small, Phi-2, Phi-3 mini, LLaMA 3 8B, Gemma 2 2B
_HEADS = {64: (12, 4), 80: (32, 8), 96: (32, 8), 128: (32, 8), 256: (8, 4)}
_FALCON_7B = (71, 1)  # a prime of heads on one kv head; its head size is 64
_LAYERS = 2
_SPREAD = 1.25  # of what a projection makes of values around 1; that of the tiny models


def make_decoder(family: str, head_size: int, device: torch.device) -> Any:
    """A model of transformers in float32, of the tiny models' families and with their settings."""
    heads, kv_heads = _FALCON_7B if (family, head_size) == ("falcon-7b", 64) else _HEADS[head_size]
    model_type, settings = FAMILIES[family]
    # Where the tiny model's heads are wider together than the hidden size, they are here.
    hidden = heads * head_size // (2 if "head_dim" in settings else 1)
    spread = _SPREAD / math.sqrt(hidden)
    if model_type in ("gpt2", "gptj"):
        changes = {"n_embd": hidden, "n_head": heads, "n_layer": _LAYERS, "initializer_range": spread}
        changes |= {"n_inner": settings["n_inner"] and hidden // 2 + 24}
        changes |= {"rotary_dim": head_size // 4} if model_type == "gptj" else {}
        with torch.device(device):
            return make_model(family, **changes)
    feed_forward = {"opt": "ffn_dim", "falcon": "ffn_hidden_size"}.get(model_type, "intermediate_size")
    changes = {
        "hidden_size": hidden,
        "num_hidden_layers": _LAYERS,
        "n_head" if model_type == "bloom" else "num_attention_heads": heads,
        "initializer_range": spread,
    }
    if model_type != "bloom":  # whose feed-forward part is four times as wide as the rest
        changes |= {feed_forward: hidden // 2 + 24}
    changes |= {name: _kv_heads(settings[name], heads, kv_heads) for name in _KV_NAMES if settings.get(name)}
    if "num_key_value_heads" not in settings:
        changes |= {"num_key_value_heads": kv_heads}
    if model_type == "mixtral":
        # Its other ways need more of a GPU and of torch, and are no more exact.
        changes |= {"experts_implementation": "eager"}
    own = {
        "head_dim": head_size,
        "query_pre_attn_scalar": head_size + 8,  # unlike the head size, which is another way to be wrong
        "layer_types": settings.get("layer_types", [])[:_LAYERS],
        "max_window_layers": 1,
        "word_embed_proj_dim": hidden // 2,
    }
    changes |= {name: value for name, value in own.items() if name in settings}
    with torch.device(device):
        model = make_model(family, **changes)
    if "word_embed_proj_dim" in settings:
        # Nothing else brings these embeddings to the size of the biases, beside which texts would look the same.
        model.model.decoder.project_in.weight.data /= spread
    return model


_KV_NAMES = ("num_key_value_heads", "num_kv_heads")
_TINY_HEADS = 6


def _kv_heads(tiny: int, heads: int, kv_heads: int) -> int:
    """Kv heads where the tiny model has so many for its six: one, one for each head, or a few."""
    return {1: 1, _TINY_HEADS: heads}.get(tiny, kv_heads)


def make_encoder(architecture: str, head_size: int, device: torch.device) -> Any:
    """A BERT or RoBERTa of transformers in float32, by its class name."""
    heads, _ = _HEADS[head_size]
    hidden = heads * head_size
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": hidden // 2 + 24,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": heads,
        "initializer_range": _SPREAD / math.sqrt(hidden),
    }
    return _make_encoder(architecture, sizes, device, bias_spread=0.2)


def make_t5(variant: str, head_size: int, device: torch.device) -> Any:
    """A T5 of transformers in float32; its buckets are the real ones, its heads together wider than its hidden size."""
    layers = {"num_layers": _LAYERS, "num_decoder_layers": _LAYERS}
    changes = {name: value for name, value in T5_VARIANTS[variant].items() if name not in layers}
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 512, "d_kv": head_size, "d_ff": 280, "num_heads": 12}
    # A small embedding, or a head that is tied to it would only repeat what it reads.
    return _make_t5(sizes | layers | changes, device, embedding_spread=_SPREAD / math.sqrt(512))


# name -> class of transformers, and in what its sizes differ from the class's own, which are those of the first
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertForMaskedLM", {}),
    "bert-large": (
        "BertForMaskedLM",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "roberta-base": (
        "RobertaForMaskedLM",
        {"vocab_size": 50265, "max_position_embeddings": 514, "layer_norm_eps": 1e-5},
    ),
    "t5-small": ("T5ForConditionalGeneration", {}),
    "t5-base": (
        "T5ForConditionalGeneration",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12},
    ),
    "flan-t5-base": (
        "T5ForConditionalGeneration",
        {
            "d_model": 768,
            "d_ff": 2048,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
}


def make_known(name: str, device: torch.device) -> Any:
    """A well-known model at its real sizes, of random weights, in float32."""
    architecture, sizes = KNOWN[name]
    # Weights and biases are as large as trained ones; larger ones make all tokens of a text alike in 24 layers.
    if architecture.startswith("T5"):
        return _make_t5(sizes, device, embedding_spread=1.0)
    return _make_encoder(architecture, sizes, device, bias_spread=0.02)


def injected(reference: Any, dtype: torch.dtype, device: torch.device) -> Model:
    """Our model of a copy of the reference's weights."""
    policy = find_policy(type(reference).__name__)
    return inject(copy.deepcopy(reference), policy, dtype=dtype, device=device).model


def _make_encoder(architecture: str, sizes: dict[str, Any], device: torch.device, *, bias_spread: float) -> Any:
    import transformers

    if architecture.startswith("Roberta"):
        sizes = {"type_vocab_size": 1, "pad_token_id": 1} | sizes
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**sizes)
    config.architectures = [architecture]
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                scale = name.endswith(("LayerNorm.weight", "layer_norm.weight"))
                parameter.normal_(mean=1.0 if scale else 0.0, std=0.2 if scale else bias_spread)
    return model


def _make_t5(sizes: dict[str, Any], device: torch.device, *, embedding_spread: float) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**{"decoder_start_token_id": 0, "eos_token_id": 1} | sizes)
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = T5ForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
            elif "relative" in name:
                parameter.normal_()
            elif "shared" in name or "lm_head" in name:
                parameter.normal_(std=embedding_spread)
    return model
