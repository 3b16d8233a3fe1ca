"""Describes a model folder to clients: its card, and the text files that the card names by hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from headrace.card import CHAT_TEMPLATE, TOKENIZER, ModelCard
from headrace.errors import HeadraceError, ModelFilesError
from headrace.kernels.spec import ModelSpec
from headrace.sampling import SamplingParams
from headrace.tasks import EMBED, FILL_MASK
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.pooling import pooling_defaults
from headrace.workers.samples import SAMPLE_BYTES, sample_places

__all__ = ["describe"]

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_MASKS = ("[MASK]", "<mask>")
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def describe(
    folder: Path | Checkpoint, *, name: str | None = None, dtype: str = "auto", quantize: str | None = None
) -> tuple[ModelCard, dict[str, bytes]]:
    """The card of a model folder, and the content of the files it names.

    Raises:
        ModelError: files are missing, damaged or do not fit each other, or the family is not covered.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
    tokenizer_config = checkpoint.read_json("tokenizer_config.json")
    generation = checkpoint.read_json("generation_config.json")
    blobs = _blobs(checkpoint, tokenizer_config)
    spec = checkpoint.spec
    torch_dtype = str(checkpoint.dtype(dtype)).removeprefix("torch.")
    card = ModelCard(
        name=name or checkpoint.folder.name,
        architecture=checkpoint.architecture,
        family=checkpoint.policy.family,
        fingerprint=_fingerprint(
            checkpoint,
            blobs,
            f"{torch_dtype} {quantize}" if quantize else torch_dtype,
            generation.get("decoder_start_token_id"),
        ),
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_positions,
        dtype=torch_dtype,
        quantization=quantize or "",
        num_parameters=_num_parameters(checkpoint, tied=spec.head is not None and spec.head.tied),
        eos_token_ids=_end_ids(checkpoint, generation),
        blobs={file: hashlib.sha256(content).hexdigest() for file, content in blobs.items()},
        special_tokens=_special_tokens(tokenizer_config),
        sampling_defaults=_sampling_defaults(generation),
        created=int(max(path.stat().st_mtime for path in checkpoint.files)),
    )
    if spec.is_encoder:
        card = _as_encoder(card, checkpoint, spec, blobs)
    return card, blobs


def _as_encoder(card: ModelCard, checkpoint: Checkpoint, spec: ModelSpec, blobs: dict[str, bytes]) -> ModelCard:
    """The card with what an encoder can be asked for."""
    mask = _mask_token_id(json.loads(blobs[TOKENIZER]), card.special_tokens.get("mask_token"))
    fills = spec.head is not None and mask is not None
    return dataclasses.replace(
        card,
        tasks=(EMBED, FILL_MASK) if fills else (EMBED,),
        embedding_size=spec.hidden_size,
        pooling_defaults=pooling_defaults(checkpoint),
        mask_token_id=mask,
        eos_token_ids=(),
        sampling_defaults={},
    )


def _mask_token_id(tokenizer: dict[str, Any], name: str | None) -> int | None:
    """The id of the token that stands for a missing one, by its name or the usual ones."""
    names = _MASKS if name is None else (name,)
    added = tokenizer.get("added_tokens") or ()
    return next((int(token["id"]) for token in added if token.get("content") in names), None)


def _blobs(checkpoint: Checkpoint, tokenizer_config: dict[str, Any]) -> dict[str, bytes]:
    blobs = {TOKENIZER: _tokenizer(checkpoint)}
    template = checkpoint.folder / CHAT_TEMPLATE
    if template.is_file():
        blobs[CHAT_TEMPLATE] = template.read_bytes()
    else:
        inline = tokenizer_config.get("chat_template")
        if isinstance(inline, list):  # several by name; "default" is the one for chats
            inline = next((entry.get("template") for entry in inline if entry.get("name") == "default"), None)
        if isinstance(inline, str):
            blobs[CHAT_TEMPLATE] = inline.encode()
    return blobs


def _tokenizer(checkpoint: Checkpoint) -> bytes:
    """tokenizer.json, or what transformers makes of an older kind of tokenizer files."""
    path = checkpoint.folder / TOKENIZER
    if path.is_file():
        return path.read_bytes()
    from transformers import AutoTokenizer

    try:
        # Without any file transformers would make a tokenizer that knows no word.
        if not any((checkpoint.folder / name).is_file() for name in _VOCABULARIES):
            raise FileNotFoundError
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
        converted: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # no files, unknown kind, missing converter: transformers raises many types
        raise ModelFilesError(
            f"{str(checkpoint.folder)!r} has no {TOKENIZER}, and none could be made of its other files "
            f"({type(error).__name__}). Add the tokenizer's files.",
            param="model",
        ) from error
    return converted.encode()


def _fingerprint(checkpoint: Checkpoint, blobs: dict[str, bytes], dtype: str, start_token: object) -> str:
    """Hash of config, tokenizer, dtype, weights and what an encoder-decoder's texts begin with.

    Of the weights the headers and samples spread over each file enter: reading all of a large model would take longer
    than loading it, and weights that were trained on differ nearly everywhere.
    """
    digest = hashlib.sha256(f"{dtype} {start_token}".encode())
    digest.update((checkpoint.folder / "config.json").read_bytes())
    digest.update(blobs[TOKENIZER])
    for path in checkpoint.files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for place in sample_places(size):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _num_parameters(checkpoint: Checkpoint, *, tied: bool) -> int:
    return sum(
        math.prod(place.shape) for name, place in checkpoint.tensors.items() if not (tied and name == "lm_head.weight")
    )


def _end_ids(checkpoint: Checkpoint, generation: dict[str, Any]) -> tuple[int, ...]:
    ids = generation.get("eos_token_id", list(checkpoint.facts.eos_token_ids))
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(int(id) for id in listed))


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        token = tokenizer_config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The model's own settings, as far as they are settings of ours; a bad file must not stop the model."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    defaults = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except HeadraceError:
        return {}
    return defaults
