"""Models out of shapes: a module of transformers with random weights, or a folder of one. Imports torch when used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.benchmarks.shapes import SHAPES, Source

__all__ = ["config_of", "dtype_of", "peer_module", "random_module", "spec_of", "write_folder"]


def config_of(source: Source) -> Any:
    """The config of transformers, naming the architecture as those of checkpoints do."""
    if source.folder is not None:
        from headrace.workers.checkpoint import Checkpoint

        return Checkpoint(Path(source.folder)).config
    import transformers

    assert source.shape is not None
    shape = SHAPES[source.shape]
    config = getattr(transformers, shape.architecture).config_class(**shape.with_layers(source.layers))
    config.architectures = [shape.architecture]
    return config


def spec_of(source: Source) -> Any:
    """Our specification of a model."""
    from headrace.kernels.policies import find_policy

    config = config_of(source)
    return find_policy(config.architectures[0]).spec(config)


def dtype_of(source: Source) -> Any:
    """The torch dtype of weights and cache."""
    if source.folder is not None:
        from headrace.workers.checkpoint import Checkpoint

        return Checkpoint(Path(source.folder)).dtype(source.dtype)
    import torch

    return getattr(torch, source.dtype)


def random_module(source: Source, device: Any, seed: int) -> Any:
    """A module of a shape whose values stay finite, whatever they mean; the same for the same seed and device."""
    import torch
    import transformers

    config = config_of(source)
    torch.manual_seed(seed)
    with torch.device(device):
        module = getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype_of(source))
    return module.eval().requires_grad_(False)


def peer_module(source: Source, device: Any, seed: int) -> Any:
    """The module of transformers, as its users have it."""
    if source.folder is None:
        return random_module(source, device, seed)
    import transformers

    _be_quiet()
    kind = getattr(transformers, config_of(source).architectures[0])
    module = kind.from_pretrained(source.folder, dtype=dtype_of(source), local_files_only=True)
    return module.to(device).eval().requires_grad_(False)


def write_folder(source: Source, folder: Path, device: Any, seed: int) -> None:
    """A model folder of a shape; in its tokenizer, every token is a word."""
    from tokenizers import Tokenizer, models

    _be_quiet()
    folder.mkdir(parents=True, exist_ok=True)
    module = random_module(source, device, seed)
    module.save_pretrained(folder)
    words = {f"w{number}": number for number in range(module.config.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def _be_quiet() -> None:
    """No bars of progress between the lines of the benchmark."""
    from transformers.utils import logging

    logging.disable_progress_bar()
