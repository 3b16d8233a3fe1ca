"""Settings of an inference engine, checked once; DeepSpeed's names for them are understood too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.errors import ConfigError
from headrace.kernels.policies.base import Policy
from headrace.workers.inference.spelling import translate

__all__ = ["InferenceConfig"]


@dataclass(frozen=True, kw_only=True, init=False)
class InferenceConfig:
    """Settings of `headrace.init_inference`, by these names or by those of DeepSpeed-Inference (docs/library.md).

    Attributes:
        dtype: of weights and activations: float32, bfloat16, float16, or auto for the model's own. A torch.dtype, or
            its name. DeepSpeed's int8 is `quantize`.
        device: where the model goes; None is the GPU if there is one, else the CPU.
        max_tokens: most tokens of one text, prompt and output together; None takes the model's own limit.
        min_tokens: tokens of one text for which there must be memory, or init_inference fails.
        policy: covers a family that we do not ship, or replaces the one we do.
        hidden_size: what the model's hidden size should be; another is an error. None does not check.
        heads: likewise its number of attention heads.
        layer_norm_eps: likewise what its norms add to the variance.
        tensor_parallel: GPUs that share the model; this release computes on one.
        quantize: int8 or fp8, in which the weights of layers are kept; None keeps them in `dtype`. Likewise
            torch.int8 or torch.float8_e4m3fn.
        offload: None; this release keeps all weights on the device.
        cuda_graphs: whether a GPU computes by CUDA graphs, which are captured when first needed: None where it can,
            True or an error, False never.

    Raises:
        ConfigError: a name is unknown (the nearest is named), a value is out of range or cannot be honoured.
    """

    dtype: str = "auto"
    device: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 1
    policy: Policy | None = None
    hidden_size: int | None = None
    heads: int | None = None
    layer_norm_eps: float | None = None
    tensor_parallel: int = 1
    quantize: str | None = None
    offload: None = None
    cuda_graphs: bool | None = None

    def __init__(self, **settings: Any) -> None:
        given = translate(settings, _NAMES)
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, given.get(field.name, field.default))
        object.__setattr__(self, "device", None if self.device is None else _device(self.device))
        self._check_sizes()
        self._check_release()

    @classmethod
    def of(cls, config: InferenceConfig | Mapping[str, Any] | str | Path | None, **settings: Any) -> InferenceConfig:
        """A config from what `init_inference` takes: an InferenceConfig, a map or a JSON file, and single settings.

        Raises:
            ConfigError: as above; or a setting is given twice with different values.
        """
        if config is None:
            return cls(**settings)
        if isinstance(config, str | Path):
            config = _read(Path(config))
        if isinstance(config, Mapping):
            config = cls(**config)
        if not isinstance(config, InferenceConfig):
            raise ConfigError(
                f"config is {type(config).__name__}; give an InferenceConfig, a dict, or the path of a JSON file.",
                param="config",
            )
        own = cls(**settings)
        changes = {name: getattr(own, name) for name in _given(own)}
        for name in changes.keys() & _given(config):
            if changes[name] != getattr(config, name):
                raise ConfigError(
                    f"{name} is {getattr(config, name)!r} in config, but {changes[name]!r} beside it; give it once.",
                    param=name,
                )
        return dataclasses.replace(config, **changes)

    def _check_sizes(self) -> None:
        for name in ("max_tokens", "min_tokens", "hidden_size", "heads", "tensor_parallel"):
            value = getattr(self, name)
            if value is None and name not in ("min_tokens", "tensor_parallel"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1.", param=name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens}).", param="min_tokens"
            )
        eps = self.layer_norm_eps
        if eps is not None and (isinstance(eps, bool) or not isinstance(eps, int | float) or eps <= 0):
            raise ConfigError(f"layer_norm_eps is {eps!r}; give a number above 0.", param="layer_norm_eps")
        if self.cuda_graphs is not None and not isinstance(self.cuda_graphs, bool):
            raise ConfigError(
                f"cuda_graphs is {self.cuda_graphs!r}; give True, False, or None for where there is a GPU.",
                param="cuda_graphs",
            )
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise ConfigError(
                f"policy is {type(self.policy).__name__}; give a headrace.kernels.policies.base.Policy.", param="policy"
            )

    def _check_release(self) -> None:
        """Refuse what this release does not do, rather than do something else."""
        if self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel}, but this release computes on one GPU. Leave it out; if "
                "the model does not fit, use quantize='int8', dtype='bfloat16' or a smaller model.",
                param="tensor_parallel",
            )
        if self.offload is not None:
            raise ConfigError(
                "offload is given, but this release keeps all weights on the device. Leave it out; if the model does "
                "not fit, use quantize='int8', dtype='bfloat16', device='cpu' or a smaller model.",
                param="offload",
            )


_NAMES = frozenset(field.name for field in dataclasses.fields(InferenceConfig))


def _given(config: InferenceConfig) -> set[str]:
    """Settings that differ from their defaults."""
    return {field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default}


def _device(device: Any) -> str:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device is {device!r}; give for example 'cpu' or 'cuda:0'.", param="device") from None
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        raise ConfigError(
            f"device is {str(found)!r}, but PyTorch finds {torch.cuda.device_count()} GPUs here. Use device='cpu', or "
            "check the driver and PyTorch's CUDA build.",
            param="device",
        )
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {str(found)!r}; supported are cpu and cuda.", param="device")
    return str(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The config file {str(path)!r} cannot be read: {error}.", param="config") from None
    if not isinstance(content, dict):
        raise ConfigError(f"The config file {str(path)!r} holds no JSON object.", param="config")
    return content
