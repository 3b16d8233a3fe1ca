"""What a config says of a model, kept between starts.

Only transformers knows what a config leaves out, and importing it takes longer than reading gigabytes of weights: two
to eight seconds. So what we need of a config, which is little, is kept in the cache folder as JSON. It is found again
only by all that it was made of: the config's content, our version and source, transformers' version.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import typing
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any

from headrace import __version__
from headrace.addresses import cache_dir
from headrace.kernels import policies, spec
from headrace.kernels.policies.base import Policy
from headrace.kernels.spec import ModelSpec

__all__ = ["Facts", "kept_facts"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What we need of a config.

    Attributes:
        spec: that the policy makes of it.
        dtype: of the checkpoint, as torch calls it; empty if the config does not say.
        eos_token_ids: tokens that end a text.
    """

    spec: ModelSpec
    dtype: str
    eos_token_ids: tuple[int, ...]


def kept_facts(config: bytes, policy: Policy, make: Callable[[], Facts]) -> Facts:
    """The facts of a config, kept or made.

    Args:
        config: content of config.json.
        policy: of its family, one of ours.
        make: makes them, with the help of transformers.
    """
    path = cache_dir() / "specs" / f"{_key(config, policy)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        facts: Facts = _read(Facts, json.loads(path.read_text(encoding="utf-8")), {})
        return facts
    facts = make()
    _keep(path, facts)
    return facts


def _key(config: bytes, policy: Policy) -> str:
    digest = hashlib.sha256(config)
    for part in (policy.family, __version__, version("transformers"), _own_source()):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()[:32]


@functools.cache
def _own_source() -> str:
    """A hash of the code that facts are made by: someone who changes a policy shall not see the old one."""
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(spec.__file__), *sorted(Path(policies.__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _keep(path: Path, facts: Facts) -> None:
    """Write a file that is there as a whole or not at all; where it cannot be, the next start takes longer."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError, TypeError):  # the latter if a spec holds what its annotations do not say
        content = json.dumps(dataclasses.asdict(facts))
        if _read(Facts, json.loads(content), {}) != facts:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content, encoding="utf-8")
        part.replace(path)


def _read(annotation: Any, value: Any, known: dict[Any, Any]) -> Any:
    """What JSON holds, as a field's annotation wants it; equal parts, of which layers have many, become one."""
    if dataclasses.is_dataclass(annotation):
        assert isinstance(annotation, type)
        hints = _hints(annotation)
        if type(value) is not dict:
            raise TypeError(f"{value!r} is no map")
        made = annotation(**{name: _read(hints[name], part, known) for name, part in value.items()})
        return known.setdefault(made, made)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, UnionType):
        return None if value is None else _read(next(arg for arg in args if arg is not type(None)), value, known)
    if origin is tuple and type(value) is list:
        return tuple(_read(args[0], part, known) for part in value)
    if origin is typing.Literal or type(value) is annotation or (annotation is float and type(value) is int):
        return value
    raise TypeError(f"{value!r} is no {annotation}")


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)
