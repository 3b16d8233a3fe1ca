"""How people write that weights shall be quantized, turned into the name of a scheme or None.

Ours are names. DeepSpeed's are a dtype, a number of groups, and maps of bits, type and groups, for weights and for
activations. What they ask for beyond our schemes (`headrace.kernels.quantize`) is an error, never left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import ConfigError
from headrace.kernels.quantize import SCHEMES

__all__ = ["SCHEME_OF_DTYPE", "read_quantize"]

# A dtype that means a scheme: weights are of it, activations are not.
SCHEME_OF_DTYPE = {str(scheme.dtype).removeprefix("torch."): name for name, scheme in SCHEMES.items()}

_NAMES = {**{name: name for name in SCHEMES}, **SCHEME_OF_DTYPE}
_PARTS = ("weight", "qkv", "activation")  # of DeepSpeed's map, each a map of its own
_BITS = ("num_bits", "q_bits", "quant_bits", "bits")
_TYPES = ("q_type", "quant_type")
_GROUPS = ("q_groups", "quant_groups", "groups")


def read_quantize(value: Any) -> str | None:
    """The scheme that a value of `quantize`, `quantization_setting` or `quant` means.

    Raises:
        ConfigError: it means something else, or nothing.
    """
    if value is None or value is False or value == {}:
        return None
    if isinstance(value, Mapping):
        return _of_map(value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], bool):
        if value[0]:
            raise _refused("asks for extra groups of the MLP's weights (True)", "leave it out")
        value = value[1]  # DeepSpeed's (extra groups of the MLP, groups)
    if isinstance(value, int) and not isinstance(value, bool):
        _check_groups(value)
        return "int8"
    name = str(value).removeprefix("torch.")
    if name in _NAMES:
        return _NAMES[name]
    shown = repr(value) if isinstance(value, str | bool | float | tuple | list) else f"of type {type(value).__name__}"
    raise ConfigError(f"quantize is {shown}; give 'int8', 'fp8', or None for weights as they are.", param="quantize")


def _of_map(given: Mapping[str, Any]) -> str | None:
    """What a map of DeepSpeed's means: one that names its parts, or the settings of weights alone."""
    if given.get("enabled") is False:
        return None
    parts = {name: given[name] for name in _PARTS if given.get(name)}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise _refused(f"has {name}={part!r}, which is no map", "leave it out")
    if parts.get("activation", {}).get("enabled", bool(parts.get("activation"))):
        raise _refused("asks for quantized activations, which stay in dtype here", "leave 'activation' out")
    if parts.get("qkv", {}).get("enabled") is False:
        raise _refused("leaves queries, keys and values out, which are always quantized here", "leave 'qkv' out")
    _check_weight({name: value for name, value in given.items() if name not in (*_PARTS, "enabled")})
    for name in ("weight", "qkv"):
        _check_weight(parts.get(name, {}))
    return "int8" if parts.get("weight", {}).get("enabled") is not False else None


def _check_weight(given: Mapping[str, Any]) -> None:
    """Refuse settings of a weight that are not those of int8."""
    for name, value in given.items():
        if name in _BITS:
            if value != 8:
                raise _refused(f"has {name}={value!r}", "give 8")
        elif name in _TYPES:
            kind = str(getattr(value, "value", value)).lower()
            if kind != "symmetric":
                raise _refused(f"has {name}={kind!r}, but zero is always zero here", "give 'symmetric'")
        elif name in _GROUPS:
            _check_groups(value)
        elif name != "enabled" and value not in (None, {}, False):
            raise _refused(f"has {name}={value!r}", "leave it out")


def _check_groups(count: Any) -> None:
    if count != 1:
        raise _refused(f"asks for {count!r} groups, but each row of a weight is one here", "give 1")


def _refused(what: str, advice: str) -> ConfigError:
    return ConfigError(
        f"The quantization {what}; that cannot be honoured. For DeepSpeed's spelling {advice}; ours is "
        "quantize='int8': 8 bits, symmetric, a factor for each row of a weight.",
        param="quantize",
    )
