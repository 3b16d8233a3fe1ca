"""From what a person hands to `init_inference` to a Model: a Hugging Face module, a folder, a .gguf file, a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from headrace.errors import ConfigError, UnsupportedModelError
from headrace.kernels.inject import config_of, inject
from headrace.kernels.model import Model
from headrace.kernels.policies import find_policy
from headrace.kernels.policies.base import Policy
from headrace.kernels.quantize import find_scheme
from headrace.kernels.spec import ModelSpec
from headrace.workers.checkpoint import DTYPES, Checkpoint
from headrace.workers.inference.config import InferenceConfig
from headrace.workers.inference.memory import check_room
from headrace.workers.inference.road import has_graphs
from headrace.workers.inference.tasks import blank_task, task_class
from headrace.workers.loader import loading
from headrace.workers.models import resolve

__all__ = ["Loaded", "load"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with what belongs to it.

    Attributes:
        model: ready to run.
        policy: by which it was injected.
        architecture: Hugging Face class name.
        config: of transformers.
        generation_config: its defaults of `generate`.
        folder: where its tokenizer is; None for a module.
        unused: tensors that are not part of the model.
        task: a head that is left to transformers, without the model that it stands on; None if there is none.
    """

    model: Model
    policy: Policy
    architecture: str
    config: Any
    generation_config: GenerationConfig
    folder: Path | None = None
    unused: tuple[str, ...] = ()
    task: nn.Module | None = None


def load(source: object, config: InferenceConfig) -> Loaded:
    """The model of a source.

    Raises:
        ConfigError: the source is neither a module nor a path, or a setting contradicts the model.
        ModelError: files are missing or damaged, the family is not covered, or there is no memory for it on the GPU.
    """
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        # A folder may hold a model alone: whoever has token ids needs no tokenizer.
        return _from_folder(folder if folder.is_dir() else resolve(str(source)), config)
    if isinstance(source, nn.Module):
        return _from_module(source, config)
    raise ConfigError(
        f"The model is {type(source).__name__}; give a Hugging Face module, a folder, a .gguf file or a hub id.",
        param="model",
    )


def _from_folder(folder: Path, config: InferenceConfig) -> Loaded:
    checkpoint = Checkpoint(folder, policy=config.policy)
    _check_policy(checkpoint.policy, checkpoint.architecture)
    _check_spec(checkpoint.spec, checkpoint.architecture, config)
    device = _device(config, None)
    _check_graphs(checkpoint.architecture, device, config)
    task = None
    if checkpoint.architecture in checkpoint.policy.tasks:
        task = blank_task(task_class(checkpoint.architecture), checkpoint.config)
    scheme = find_scheme(config.quantize, device)
    check_room(checkpoint.spec, checkpoint.architecture, checkpoint.dtype(config.dtype), device, config)
    with loading(checkpoint, dtype=config.dtype, device=device, task=task, scheme=scheme) as under_way:
        injected = under_way.finished()
    if (folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(folder)
    else:
        generation_config = GenerationConfig.from_model_config(checkpoint.config)
    return Loaded(
        model=injected.model,
        policy=checkpoint.policy,
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        generation_config=generation_config,
        folder=folder,
        unused=injected.unused,
        task=task,
    )


def _from_module(module: nn.Module, config: InferenceConfig) -> Loaded:
    architecture = type(module).__name__
    if not hasattr(module, "config"):
        raise UnsupportedModelError(
            f"The {architecture} has no config, so nobody can tell what model it is. Give a Hugging Face model"
            f"{' without its wrapper' if hasattr(module, 'module') else ''}.",
            param="model",
        )
    policy = find_policy(architecture) if config.policy is None else config.policy
    _check_policy(policy, architecture)
    spec = policy.spec(config_of(module))
    _check_spec(spec, architecture, config)
    parameter = next(module.parameters(), None)
    device = _device(config, parameter)
    _check_graphs(architecture, device, config)
    own = parameter.dtype if parameter is not None and parameter.dtype in DTYPES.values() else torch.float32
    dtype = own if config.dtype == "auto" else DTYPES[config.dtype]
    generation_config = getattr(module, "generation_config", None) or GenerationConfig.from_model_config(module.config)
    task = blank_task(type(module), module.config) if architecture in policy.tasks else None
    scheme = find_scheme(config.quantize, device)
    if not any(parameter.is_cuda for parameter in module.parameters()):  # of those there the memory is taken already
        check_room(spec, architecture, dtype, device, config)
    injected = inject(module, policy, dtype=dtype, device=device, task=task, scheme=scheme)
    return Loaded(
        model=injected.model,
        policy=policy,
        architecture=architecture,
        config=module.config,
        generation_config=generation_config,
        unused=injected.unused,
        task=task,
    )


def _device(config: InferenceConfig, parameter: nn.Parameter | None) -> torch.device:
    """Where the model goes: as told, where it is if that is a GPU, or to the GPU if there is one."""
    if config.device is not None:
        return torch.device(config.device)
    if parameter is not None and parameter.is_cuda:
        return parameter.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _check_policy(policy: Policy, architecture: str) -> None:
    if architecture not in policy.classes:
        raise UnsupportedModelError(
            f"The policy of {policy.family!r} covers {', '.join(policy.classes)}, but the model is a "
            f"{architecture}. Name it in the policy's architectures if it is the same in all but its name.",
            param="policy",
        )


def _check_graphs(architecture: str, device: torch.device, config: InferenceConfig) -> None:
    """Refuse to promise CUDA graphs where there can be none."""
    if config.cuda_graphs and not has_graphs(device):
        raise ConfigError(
            f"cuda_graphs is True, but the {architecture} goes to {str(device)!r}, which has none. Leave it out, and "
            "there are graphs wherever there is a GPU.",
            param="cuda_graphs",
        )


def _check_spec(spec: ModelSpec, architecture: str, config: InferenceConfig) -> None:
    """Refuse a model that is not what the caller says it is."""
    layer = spec.layers[0]
    found = {
        "hidden_size": spec.hidden_size,
        "heads": layer.attention.num_heads,
        "layer_norm_eps": layer.norm.eps,
    }
    for name, value in found.items():
        said = getattr(config, name)
        if said is not None and said != value:
            raise ConfigError(
                f"{name} is {said}, but the {architecture} has {value}; leave it out, the model's config knows.",
                param=name,
            )
    if config.max_tokens is not None and config.max_tokens > spec.max_positions:
        raise ConfigError(
            f"max_tokens is {config.max_tokens}, but the {architecture} was made for {spec.max_positions}; lower it or "
            "leave it out.",
            param="max_tokens",
        )
