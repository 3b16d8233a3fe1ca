"""Tiny encoders with random weights, with and without heads; and any tiny model by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_models import T5_VARIANTS, make_model, make_t5
from tests.support.tiny_tokenizer import ENCODER_VOCAB_SIZE, encoder_tokenizer_json

__all__ = ["ENCODERS", "TASKS", "make_any", "make_encoder", "save_encoder"]

_ROBERTA = {"type_vocab_size": 1, "pad_token_id": 1}

# name -> class of transformers and what is unusual about its config
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {}),
    "bert-relu-untied": ("BertForMaskedLM", {"hidden_act": "relu", "tie_word_embeddings": False}),
    "bert-pooled": ("BertModel", {"type_vocab_size": 3}),
    "roberta": ("RobertaForMaskedLM", _ROBERTA | {"hidden_act": "gelu_new"}),
    "roberta-pooled": ("RobertaModel", _ROBERTA),
}

# Classes whose head is that of transformers.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{family}-{task}": (
        f"{family.title()}For{task}",
        changes | {"num_labels": 2 if task == "QuestionAnswering" else 5},
    )
    for family, changes in (("bert", {}), ("roberta", _ROBERTA))
    for task in ("MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification")
} | {"bert-NextSentencePrediction": ("BertForNextSentencePrediction", {})}


def make_encoder(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in float32, biases and norms random too."""
    import transformers

    class_name, differences = (ENCODERS | TASKS)[name]
    model_class = getattr(transformers, class_name)
    settings = {
        "vocab_size": 101,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 40,
        "initializer_range": 0.15,
    }
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings | differences | changes)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                scale = "LayerNorm.weight" in parameter_name or "layer_norm.weight" in parameter_name
                parameter.normal_(mean=1.0 if scale else 0.0, std=0.2)
    return model


def save_encoder(folder: Path, name: str = "bert", *, seed: int = 0, **changes: Any) -> Any:
    """Write an encoder with its tokenizer; returns the transformers model for comparison."""
    model = make_encoder(name, seed=seed, **{"vocab_size": ENCODER_VOCAB_SIZE, **changes})
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(encoder_tokenizer_json())
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    return model


def make_any(name: str, **changes: Any) -> Any:
    """A transformers model in float32: a decoder, an encoder or an encoder-decoder."""
    make = make_t5 if name in T5_VARIANTS else make_encoder if name in ENCODERS | TASKS else make_model
    return make(name, **changes)
