"""Converts a GGUF file into a folder of config.json, safetensors, tokenizer and chat template.

The result depends on the file alone (and on VERSION), byte for byte. Weights pass through in pieces, so a model of any
size needs a few hundred MB of memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.workers.models.gguf_config import architecture_of, make_config
from headrace.workers.models.gguf_file import GGUFFile
from headrace.workers.models.gguf_tokenizer import Vocabulary, tokenizer_files
from headrace.workers.models.gguf_weights import Weight, optional_biases, plan, read_bfloat16, read_floats, same_matrix
from headrace.workers.models.progress import Progress, silent
from headrace.workers.models.tensor_file import TensorFileWriter

__all__ = ["VERSION", "convert", "converted_size"]

# Raised when the result for the same file changes, so that older results are made again.
VERSION = 1

_WEIGHTS = "model.safetensors"


def converted_size(source: Path) -> int:
    """Bytes of the weights that `convert` would write; raises what `convert` would raise before writing."""
    with GGUFFile(source) as file:
        _, weights, _ = _prepare(file)
        return sum(2 * _num_elements(weight) for weight in weights)


def convert(
    source: Path,
    target: Path,
    *,
    generation: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """Write the folder `target`, which exists and is empty.

    Args:
        source: the GGUF file.
        target: where the files go.
        generation: the model's own sampling settings, for generation_config.json.
        progress: is told the bytes of weights written.

    Returns:
        sha256 by file name.

    Raises:
        ModelFilesError: the file is damaged or incomplete.
        UnsupportedModelError: it is a model that we do not convert.
    """
    with GGUFFile(source) as file:
        config, weights, vocabulary = _prepare(file)
        files = tokenizer_files(vocabulary, max_length=config["max_position_embeddings"])
        files["config.json"] = _json(config)
        files["generation_config.json"] = _json(_generation_config(vocabulary, generation or {}))
        digests = {name: _write(target / name, content) for name, content in files.items()}
        digests[_WEIGHTS] = _write_weights(file, weights, target / _WEIGHTS, progress)
    return dict(sorted(digests.items()))


def _prepare(file: GGUFFile) -> tuple[dict[str, Any], list[Weight], Vocabulary]:
    architecture = architecture_of(file.metadata, file.path)
    vocabulary = Vocabulary.from_metadata(file.metadata, file.path)
    config = make_config(
        file.metadata,
        file.path,
        tied=same_matrix(file),
        biases=optional_biases(file),
        rope_factors=read_floats(file),
    )
    for role, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if role in vocabulary.special:
            config[name] = vocabulary.special[role]
    config["eos_token_id"] = vocabulary.end_ids()
    return config, plan(file, architecture, config), vocabulary


def _generation_config(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {"eos_token_id": vocabulary.end_ids()}
    for role, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if role in vocabulary.special:
            config[name] = vocabulary.special[role]
    return config | dict(settings)


def _write_weights(file: GGUFFile, weights: list[Weight], path: Path, progress: Progress) -> str:
    shapes = {weight.name: weight.source.shape for weight in weights}
    with TensorFileWriter(path, shapes, dtype="BF16") as writer:
        for weight in weights:
            for piece in read_bfloat16(file, weight):
                writer.write(piece)
                progress("converting to safetensors", writer.written, writer.total)
        return writer.finish()


def _num_elements(weight: Weight) -> int:
    return weight.source.num_rows * weight.source.shape[-1]


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
