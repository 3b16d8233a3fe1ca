"""What a client must know of a model: its name, limits, end tokens, and where its tokenizer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headrace.tasks import GENERATE

__all__ = ["CHAT_TEMPLATE", "TOKENIZER", "ModelCard"]

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Description of a served model.

    Attributes:
        name: what clients call it.
        architecture: Hugging Face class name, for example Qwen2ForCausalLM.
        family: policy that covers it, for example qwen2.
        fingerprint: hash of weights, tokenizer and engine settings; a stream goes on only under the same one.
        vocab_size: number of logits.
        max_model_len: most tokens of prompt and output together.
        dtype: for example bfloat16.
        quantization: of the weights of layers: int8, fp8, or empty if they are of that dtype.
        num_parameters: of the model, tied weights counted once.
        eos_token_ids: ids that end a text.
        blobs: file name (TOKENIZER, CHAT_TEMPLATE) -> sha256 of its content in hexadecimal.
        special_tokens: name -> text, such as bos_token and eos_token, for the chat template.
        sampling_defaults: the model's own generation settings, as SamplingParams fields.
        created: Unix time of the model's files.
        tasks: what it can be asked for, see `headrace.tasks`.
        embedding_size: numbers in its vectors; 0 if it makes none.
        pooling_defaults: how it was trained to make vectors, as PoolingParams fields.
        mask_token_id: the token that stands for a missing one; None if there is none.
    """

    name: str
    architecture: str
    family: str
    fingerprint: str
    vocab_size: int
    max_model_len: int
    dtype: str = "float32"
    quantization: str = ""
    num_parameters: int = 0
    eos_token_ids: tuple[int, ...] = ()
    blobs: dict[str, str] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    created: int = 0
    tasks: tuple[str, ...] = (GENERATE,)
    embedding_size: int = 0
    pooling_defaults: dict[str, Any] = field(default_factory=dict)
    mask_token_id: int | None = None
