"""DeepSpeed-Inference's names of settings, turned into ours.

Every name that its `init_inference` took is known here: it is translated, or accepted because it says what is the case
anyway, or refused with what to do instead. Nothing is ignored: a value that would have to change something and cannot
is an error.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from headrace.errors import ConfigError
from headrace.workers.inference.quantize_spelling import SCHEME_OF_DTYPE, read_quantize

__all__ = ["translate"]

# Another word for the same thing; said once, so that new code uses ours.
_RENAMED = {
    "mp_size": "tensor_parallel",
    "tp": "tensor_parallel",
    "tp_size": "tensor_parallel",
    "max_out_tokens": "max_tokens",
    "min_out_tokens": "min_tokens",
    "enable_cuda_graph": "cuda_graphs",
    "quantization_setting": "quantize",
    "quant": "quantize",
    "zero": "offload",
    "zero_optimization": "offload",
}

# Values that say what is done anyway, so they may stay; any other value is refused with the reason.
_ALWAYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "replace_with_kernel_inject": (
        (True,),
        "replacing the layers is what init_inference does; without it, use the transformers model as it is",
    ),
    "kernel_inject": (
        (True,),
        "replacing the layers is what init_inference does; without it, use the transformers model as it is",
    ),
    "replace_method": (("auto", None), "the layers are found by the model's policy; give policy= to use your own"),
    "use_triton": ((False,), "the kernels are chosen by device; leave it out"),
    "triton_autotune": ((False,), "kernels are tuned beforehand, never at start; leave it out"),
    "triangular_masking": ((True,), "whether attention is causal is told by the model's policy; leave it out"),
    "tm": ((True,), "whether attention is causal is told by the model's policy; leave it out"),
    "return_tuple": ((True,), "layers are called by the engine alone; forward takes return_dict=False for a tuple"),
    "keep_module_on_host": ((False,), "weights are moved one at a time; give device='cpu' to stay there"),
    "set_empty_params": ((False,), "give the model's path instead of an empty module"),
    "training_mp_size": ((1,), "give a checkpoint that is not split"),
    "moe": (({}, False, None), "experts are part of a model's policy; leave it out"),
    "save_mp_checkpoint_path": ((None,), "checkpoints are saved by transformers' save_pretrained"),
    "base_dir": ((None, ""), "give the model's path as the first argument"),
    "checkpoint": ((None,), "give the model's path as the first argument"),
    "ckpt_config": (({}, None), "give the model's path as the first argument"),
    "injection_policy": ((None,), "give policy=, which says where a family's weights are (docs/library.md)"),
    "injection_dict": ((None,), "give policy=, which says where a family's weights are (docs/library.md)"),
    "injection_policy_tuple": ((None,), "give policy=, which says where a family's weights are (docs/library.md)"),
}

# Such a name does nothing, also in DeepSpeed.
_DEPRECATED = ("replace_method",)
_HALF = {"fp16": "float16", "bf16": "bfloat16"}
_DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
}


def translate(settings: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Settings under our names.

    Raises:
        ConfigError: a name means nothing, a value cannot be honoured, or two names of one setting disagree.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in settings.items():
        ours, meant = _translate_one(name, value, known)
        if ours is None:
            continue
        if ours in found and found[ours] != meant:
            raise ConfigError(
                f"{said[ours]} and {name} mean the same setting, but say {found[ours]!r} and {meant!r}; give only "
                f"{ours}.",
                param=ours,
            )
        found[ours], said[ours] = meant, name
    return found


def _translate_one(name: str, value: Any, known: frozenset[str]) -> tuple[str | None, Any]:
    if name in _HALF:
        return ("dtype", _HALF[name]) if _is_enabled(name, value) else (None, None)
    if name == "dtype" and (scheme := SCHEME_OF_DTYPE.get(str(value).removeprefix("torch."))) is not None:
        _warn(f"dtype={value} is deprecated; write quantize={scheme!r}, and dtype for activations and cache.")
        return "quantize", scheme
    if name in _ALWAYS:
        accepted, reason = _ALWAYS[name]
        if not any(value is one or value == one for one in accepted):
            raise ConfigError(f"{name} is {value!r}, which cannot be honoured: {reason}.", param=name)
        if name in _DEPRECATED:
            _warn(f"{name} does nothing and is deprecated; leave it out.")
        return None, None
    ours = _RENAMED.get(name, name)
    if ours not in known:
        raise _unknown(name, known)
    if ours != name:
        _warn(f"{name} is deprecated; write {ours}.")
    return ours, _READ[ours](value) if ours in _READ else value


def _is_enabled(name: str, value: Any) -> bool:
    enabled = value.get("enabled") if isinstance(value, Mapping) and set(value) <= {"enabled"} else value
    if not isinstance(enabled, bool):
        raise ConfigError(
            f'{name} is {value!r}; give {{"enabled": true}}, or better dtype="{_HALF[name]}".', param=name
        )
    return enabled


def _degree(value: Any) -> Any:
    """DeepSpeed's map of tensor parallelism as a number; its other fields must say what is the case anyway."""
    if not isinstance(value, Mapping):
        return value
    rest = {key: item for key, item in value.items() if key not in ("tp_size", "enabled") and item is not None}
    if rest.pop("tp_grain_size", 64) != 64 or rest:
        shown = ", ".join(sorted(set(value) - {"tp_size", "enabled"}))
        raise ConfigError(
            f"tensor_parallel has {shown}, which cannot be honoured; give a number of GPUs.", param="tensor_parallel"
        )
    return value.get("tp_size", 1) if value.get("enabled", True) else 1


def _nothing_if_empty(value: Any) -> Any:
    """What turns a feature off, in the ways people write it."""
    if value in (None, False, {}) or (isinstance(value, Mapping) and value.get("enabled") is False):
        return None
    if isinstance(value, Mapping) and value.get("stage") == 0:
        return None
    return value


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    if name in _DTYPES:
        return _DTYPES[name]
    hint = "; for weights in 8 bits, give quantize='int8'" if name in ("int4", "uint8") else ""
    raise ConfigError(f"dtype is {name}; give float32, bfloat16, float16 or auto{hint}.", param="dtype")


_READ: dict[str, Callable[[Any], Any]] = {
    "dtype": _dtype,
    "tensor_parallel": _degree,
    "quantize": read_quantize,
    "offload": _nothing_if_empty,
}


def _unknown(name: str, known: frozenset[str]) -> ConfigError:
    names = sorted(known | _RENAMED.keys() | _ALWAYS.keys())
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    near = _RENAMED.get(near, near)
    return ConfigError(
        f"There is no setting {name!r}; the nearest is {near!r}. Settings are {', '.join(sorted(known))}.", param=name
    )


def _warn(text: str) -> None:
    """Warn at the place outside of this package that wrote it; Python shows such warnings to their authors only."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("headrace."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, DeprecationWarning, stacklevel=level)
