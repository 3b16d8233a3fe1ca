"""The page docs/families.md: what of each family is computed, by which operation, and what is refused.

    python -m headrace.kernels.policies.coverage docs/families.md

Only the words are written by hand. What they are said of is read off the specs and the tables of weights that the
policies have for the configs in `headrace.kernels.policies.examples`, and off the operations themselves.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.kernels import ops
from headrace.kernels.policies import POLICIES, find_policy
from headrace.kernels.policies.base import Policy
from headrace.kernels.policies.examples import Examples, examples
from headrace.kernels.spec import AttentionSpec, HeadSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RotarySpec

__all__ = ["COMMAND", "page"]

COMMAND = "python -m headrace.kernels.policies.coverage docs/families.md"

_INTRODUCTION = f"""\
# Families

Which Hugging Face models are covered, and how. This page is made of what the policies in `kernels/policies/` say to the
configs of well-known checkpoints; after a change there, make it anew:

```sh
{COMMAND}
```
"""


_LEGEND = """\
A column is a checkpoint; where its layers differ, all ways are named. Norms are *pre* (before attention and
feed-forward), *post* (behind each, the residual added), *sandwich* (both), or *parallel* (both parts read the same
input). A head is as the config has it.
"""


def page() -> str:
    """The page, as Markdown."""
    cases = examples()
    families = [(policy, cases[policy.family]) for policy in POLICIES]
    parts = [
        _INTRODUCTION,
        *_overview(families),
        *_operations(),
        "## Family by family\n",
        _LEGEND,
        *(part for policy, case in families for part in _family(policy, case)),
        *_layouts(),
        *_refusals(families),
    ]
    return "\n".join(parts).rstrip("\n") + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --------------------------------------------------------------------------------------------------------- overview

# What a layer or a model can have, and how to see whether it does.
_FEATURES: dict[str, Callable[[ModelSpec, LayerSpec], Any]] = {
    "grouped heads": lambda spec, layer: layer.attention.num_kv_heads < layer.attention.num_heads,
    "window": lambda spec, layer: layer.attention.window,
    "soft cap": lambda spec, layer: layer.attention.soft_cap,
    "q and k norms": lambda spec, layer: layer.attention.qk_norm,
    "cross attention": lambda spec, layer: layer.cross,
    "rotary": lambda spec, layer: layer.rotary,
    "ALiBi": lambda spec, layer: layer.attention.alibi,
    "relative bias": lambda spec, layer: layer.attention.relative,
    "learned positions": lambda spec, layer: spec.embedding.positions,
    "RMS norm": lambda spec, layer: layer.norm.kind == "rms",
    "gated": lambda spec, layer: layer.mlp.gated,
    "experts": lambda spec, layer: layer.mlp.experts,
    "biases": lambda spec, layer: layer.attention.qkv_bias or layer.attention.out_bias or layer.mlp.bias,
    "tied head": lambda spec, layer: spec.head and spec.head.tied,
}


def _overview(families: list[tuple[Policy, Examples]]) -> Iterator[str]:
    yield "● in all layers of all checkpoints below, ○ in some.\n"
    rows = []
    for policy, cases in families:
        specs = [policy.spec(config) for config in cases.covered.values()]
        kinds = " / ".join(dict.fromkeys(_kind(spec) for spec in specs))
        marks = [
            _mark([bool(has(spec, layer)) for spec in specs for layer in spec.layers]) for has in _FEATURES.values()
        ]
        norms = " / ".join(dict.fromkeys(layer.placement for spec in specs for layer in spec.layers))
        rows.append([f"[{policy.family}](#{policy.family})", kinds, norms, *marks])
    yield _table(["family", "", "norms", *_FEATURES], rows)


def _names(classes: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in classes)


def _mark(found: list[bool]) -> str:
    return "●" if all(found) else "○" if any(found) else ""


def _kind(spec: ModelSpec) -> str:
    return "encoder-decoder" if spec.encoder else "encoder" if spec.is_encoder else "decoder"


# ------------------------------------------------------------------------------------------------------- operations


def _operations() -> Iterator[str]:
    yield "## Operations\n"
    yield (
        "A reference in PyTorch runs on a CPU; where there is a Triton kernel beside it, under the same signature,\n"
        "that one runs on a GPU. The others are PyTorch on both.\n"
    )
    with_kernel, without = [], []
    for module in _op_modules():
        path, kernels = f"kernels/ops/{module.__name__.rpartition('.')[2]}", _kernels(module)
        names = [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]
        pairs = [name for name in names if name in kernels and hasattr(getattr(module, name), "__wrapped__")]
        with_kernel += [[f"`{name}`", _sentence(getattr(module, name)), f"`{path}_triton.py`"] for name in pairs]
        if not pairs:
            without.append([", ".join(f"`{name}`" for name in names), _sentence(module), f"none beside `{path}.py`"])
    yield _table(["operation", "", "kernel"], with_kernel + without)


def _op_modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(ops.__path__):
        if not found.name.endswith("_triton") and found.name != "pair":
            yield importlib.import_module(f"{ops.__name__}.{found.name}")


def _kernels(module: ModuleType) -> set[str]:
    """Functions of the module of kernels beside a module of operations; read, not imported: Triton may be missing."""
    path = Path(str(module.__file__))
    path = path.with_name(f"{path.stem}_triton.py")
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def _sentence(documented: object) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())
    return text.partition(". ")[0].removesuffix(".").replace("|", "\\|")


# --------------------------------------------------------------------------------------------------- family by family


def _family(policy: Policy, cases: Examples) -> Iterator[str]:
    yield f"### {policy.family}\n"
    yield f"{_names(policy.architectures)}\n"
    if policy.tasks:
        yield f"The library alone, with the head as transformers computes it: {_names(policy.tasks)}\n"
    columns = [_slots(policy, policy.spec(config), config) for config in cases.covered.values()]
    slots = [slot for slot in columns[0] if any(column[slot] for column in columns)]
    yield _table(["", *cases.covered], ([slot, *(column[slot] for column in columns)] for slot in slots))


def _slots(policy: Policy, spec: ModelSpec, config: Any) -> dict[str, str]:
    """By part of the model, the operation and how; empty if it has no such part."""
    layers, encoder = spec.layers, spec.encoder
    return {
        "size": f"{len(layers)} layers of {spec.hidden_size}, {spec.vocab_size:,} tokens",
        "embedding": _embedding(spec),
        "encoder": _encoder(spec),
        "queries, keys, values": _projection(policy, layers[0].attention),
        "positions": _each(_positions(spec, layer, config) for layer in layers),
        "attention": _each(_attention(layer.attention) for layer in layers) + _scales(layers),
        "cross attention": _each(_cross(layer.cross) for layer in layers),
        "norm": _each(_norms(layer) for layer in layers),
        "feed-forward": _each(_mlp(layer.mlp) for layer in (*layers, *(encoder.layers if encoder else ()))),
        "head": _head(spec.head, spec),
    }


def _each(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))


def _parts(*parts: object) -> str:
    """The texts among the parts; what does not apply is anything else."""
    return ", ".join(part for part in parts if isinstance(part, str))


def _embedding(spec: ModelSpec) -> str:
    embedding = spec.embedding
    return _parts(
        embedding.scale != 1.0 and f"times {embedding.scale:.4g}",
        embedding.size != spec.hidden_size and f"projected from {embedding.size}",
        embedding.token_types > 0 and f"plus {embedding.token_types} token types",
        embedding.norm and f"`norm` {_norm(embedding.norm)}",
    )


def _encoder(spec: ModelSpec) -> str:
    if spec.encoder is None:
        return ""
    layers = spec.encoder.layers
    return _parts(f"{len(layers)} layers", _each(_attention(layer.attention) for layer in layers) + _scales(layers))


def _projection(policy: Policy, attention: AttentionSpec) -> str:
    source = policy.weights["blocks.{layer}.qkv.weight"]
    layout = None if source.layout is None else f"[{source.layout.__name__}](#{_anchor(source.layout)})"
    return _parts(
        "one tensor" if len(source.tensors) == 1 else f"{len(source.tensors)} tensors, stacked when loaded",
        layout,
        attention.qkv_bias and "bias",
    )


def _positions(spec: ModelSpec, layer: LayerSpec, config: Any) -> str:
    attention, learned = layer.attention, spec.embedding.positions
    alibi = attention.alibi
    return _parts(
        layer.rotary and _rotary(layer.rotary, attention.head_dim, config),
        learned and f"learned, {learned.count}{f' from row {learned.offset}' if learned.offset else ''}",
        alibi and f"ALiBi{', rounded' if alibi.rounded else ''}{', scaled' if alibi.scale != 1.0 else ''}",
        attention.relative
        and f"`relative_bias`, {attention.relative.num_buckets} buckets up to {attention.relative.max_distance}",
    )


def _rotary(rotary: RotarySpec, head_dim: int, config: Any) -> str:
    size = 2 * len(rotary.inverse_frequencies)
    return _parts(
        "`rotate_and_cache`, pairs are " + ("neighbours" if rotary.interleaved else "halves"),
        size < head_dim and f"{size} of {head_dim} values",
        _is_scaled(rotary) and f"scaled ({config.rope_parameters['rope_type']})",
    )


def _is_scaled(rotary: RotarySpec) -> bool:
    """Whether the frequencies are other than powers of one number, beginning with 1."""
    frequencies = rotary.inverse_frequencies
    return any(abs(found - frequencies[1] ** power) > 1e-4 * found for power, found in enumerate(frequencies))


def _attention(attention: AttentionSpec) -> str:
    heads, shared = attention.num_heads, attention.num_kv_heads
    return _parts(
        "`paged_attention`" if attention.causal else "`full_attention`",
        f"{heads} heads{f' over {shared}' if shared < heads else ''} of {attention.head_dim}",
        attention.window and f"window {attention.window}",
        attention.soft_cap and f"soft cap {attention.soft_cap:g}",
        attention.qk_norm and f"{_norm(attention.qk_norm)} of q and k",
        attention.out_bias and "bias behind",
    )


def _scales(layers: tuple[LayerSpec, ...]) -> str:
    """What is to be said of how the scores are scaled, unless that is by the size of the heads."""
    scales = {layer.attention.scale for layer in layers}
    if len(scales) > 1:
        return ", scores scaled by layer"
    [scale] = scales
    usual = math.isclose(scale, layers[0].attention.head_dim ** -0.5)
    return "" if usual else ", scores not scaled" if scale == 1.0 else f", scores times {scale:.4g}"


def _cross(attention: AttentionSpec | None) -> str:
    return "" if attention is None else f"`paged_attention`, {attention.num_heads} heads of {attention.head_dim}"


def _norm(norm: NormSpec) -> str:
    name = {"rms": "RMSNorm", "layer": "LayerNorm"}[norm.kind]
    return name + (" with 1 + scale" if norm.unit_offset else "") + ("" if norm.affine else " without scale")


def _norms(layer: LayerSpec) -> str:
    return _parts(
        f"`norm` {_norm(layer.norm)}",
        layer.placement,
        layer.placement == "parallel" and ("one norm" if layer.shared_norm else "two norms"),
        layer.residual_from_norm and "residual from the norm",
    )


def _mlp(mlp: MLPSpec) -> str:
    return _parts(
        f"`activate` {mlp.activation}",
        mlp.gated and "gated",
        f"{mlp.size} wide",
        mlp.experts and f"{mlp.experts.per_token} of {mlp.experts.count} experts",
        mlp.bias and "biases",
    )


def _head(head: HeadSpec | None, spec: ModelSpec) -> str:
    if head is None:
        return "none" + (", pooler" if spec.pooler else "")
    transform = head.transform
    return _parts(
        "tied to the embedding" if head.tied else "its own",
        head.bias and "bias",
        head.soft_cap and f"soft cap {head.soft_cap:g}",
        transform and f"behind a projection, {transform.activation} and {_norm(transform.norm)}",
        head.scale != 1.0 and f"times {head.scale:.4g}",
    )


# ------------------------------------------------------------------------------------------------ layouts and refusals


def _layouts() -> Iterator[str]:
    layouts = {source.layout for policy in POLICIES for source in policy.weights.values() if source.layout}
    yield "## Layouts of checkpoints\n"
    for layout in sorted(layouts, key=_anchor):
        yield f"### Layout {layout.__name__}\n"
        yield f"{inspect.getdoc(layout)}\n"


def _anchor(layout: Any) -> str:
    return f"layout-{layout.__name__}"


def _refusals(families: list[tuple[Policy, Examples]]) -> Iterator[str]:
    yield "## Refused\n"
    yield "Nothing is computed otherwise than the model was trained; what we do not compute is an error that says so.\n"
    refused: dict[str, list[str]] = {}
    for policy, cases in families:
        for config in cases.refused:
            refused.setdefault(_refusal(policy, config), []).append(policy.family)
    yield _table(["family", "is refused with"], ([", ".join(names), text] for text, names in refused.items()))
    yield "So is every other class; the nearest that is covered is named:\n"
    try:
        find_policy("DeepseekV3ForCausalLM")
    except UnsupportedModelError as error:
        yield f"> {error.message}\n"


def _refusal(policy: Policy, config: Any) -> str:
    try:
        policy.spec(config)
    except UnsupportedModelError as error:
        return error.message
    raise AssertionError(f"the policy of {policy.family} takes what the examples say it refuses: {config}")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
