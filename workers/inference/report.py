"""What was injected: layers, the operation in each slot, memory, and what was left alone and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from headrace.kernels.linear import Linear
from headrace.kernels.model import Model
from headrace.kernels.quantize import SCHEMES, Scheme
from headrace.kernels.spec import AttentionSpec, HeadSpec, LayerSpec, MLPSpec, RotarySpec
from headrace.kernels.tuning import MOST_ROWS
from headrace.workers.inference.kind import GeneratingKind, Kind
from headrace.workers.inference.road import Road
from headrace.workers.inference.tasks import head_parts

if TYPE_CHECKING:
    from headrace.workers.inference.streams import Streams

__all__ = ["InferenceReport", "make_report"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceReport:
    """What `init_inference` made of a model; print it.

    Attributes:
        architecture: Hugging Face class name.
        family: policy that covers it.
        layers_replaced: layers that are computed by the fused block.
        layers_total: layers that the model has.
        encoder_layers: those among them that read whole texts.
        kernels: triton on a GPU, torch (the references) elsewhere.
        slots: by part of a layer, the op that computes it and how; all ways if layers differ.
        left_alone: what was not injected, and why.
        dtype: of weights, activations and cache.
        quantized: in what the weights of layers are kept instead: int8, fp8, or empty.
        device: where the model is.
        weight_bytes: memory that the weights take, with the factors of those that are quantized.
        kv_bytes_per_token: memory that the cache takes for each token of a text; 0 if nothing is cached.
        max_tokens: of one text.
        graphs: by what is computed, the tokens of generate and of streams, and whole texts (those of an encoder, or the
            sources of an encoder-decoder), whether its steps are CUDA graphs, and if not, why.
    """

    architecture: str
    family: str
    layers_replaced: int
    layers_total: int
    encoder_layers: int
    kernels: str
    slots: dict[str, str]
    left_alone: dict[str, str]
    dtype: str
    quantized: str
    device: str
    weight_bytes: int
    kv_bytes_per_token: int
    max_tokens: int
    graphs: dict[str, str]

    def __str__(self) -> str:
        parts = f" ({self.encoder_layers} of the encoder, {self.layers_total - self.encoder_layers} of the decoder)"
        both = 0 < self.encoder_layers < self.layers_total
        cache = f"{_size(self.kv_bytes_per_token)} a token" if self.kv_bytes_per_token else "none"
        rows = {
            "model": f"{self.architecture} ({self.family})",
            "layers": f"{self.layers_replaced} of {self.layers_total} replaced{parts if both else ''}",
            "kernels": self.kernels,
            **self.slots,
            "dtype": f"{_precision(self)} on {self.device}",
            "weights": f"{_size(self.weight_bytes)}",
            "cache": f"{cache}, at most {self.max_tokens:,} tokens a text",
            "graphs": "; ".join(f"{call} {how}" for call, how in self.graphs.items()),
        }
        width = max(len(name) for name in (*rows, "left alone"))
        lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
        lines += [f"{'left alone':<{width}}  {name}: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def make_report(kind: Kind, streams: Streams | None = None) -> InferenceReport:
    """The report of a model, and of its streams if there were any."""
    loaded = kind.loaded
    model = loaded.model
    spec = model.spec
    encoder = len(spec.encoder.layers) if spec.encoder else len(spec.layers) if spec.is_encoder else 0
    blocks = len(model.blocks) + (len(model.encoder.blocks) if model.encoder is not None else 0)
    left_alone = {"embedding": "a look-up, there is nothing to fuse it with"}
    if model.scheme is not None:
        left_alone |= _not_quantized(model)
    if loaded.task is not None:
        reason = f"the head of {loaded.architecture} runs as transformers wrote it, on the states of our layers"
        left_alone |= dict.fromkeys(head_parts(loaded.task), reason)
    left_alone |= dict.fromkeys(loaded.unused, "not part of a model of this family")
    return InferenceReport(
        architecture=loaded.architecture,
        family=loaded.policy.family,
        layers_replaced=blocks,
        layers_total=len(spec.layers) + (len(spec.encoder.layers) if spec.encoder else 0),
        encoder_layers=encoder,
        kernels="triton" if kind.device.type == "cuda" else "torch",
        slots=_slots(model),
        left_alone=left_alone,
        dtype=str(kind.dtype).removeprefix("torch."),
        quantized="" if model.scheme is None else model.scheme.name,
        device=str(kind.device),
        weight_bytes=sum(
            weight.numel() * weight.element_size() for weight in (*kind.module.parameters(), *model.scales().values())
        ),
        kv_bytes_per_token=kind.cache_bytes(1),
        max_tokens=kind.max_tokens,
        graphs=_graphs(kind, streams),
    )


def _not_quantized(model: Model) -> dict[str, str]:
    """What of a quantized model is not, and why."""
    why = {"embedding": "a look-up of one row a token: there is nothing to fuse it with, nor to gain by quantizing"}
    if model.head is not None:
        why["head"] = "not quantized, for what it errs by is seen in the logits at once"
    routed = any(layer.mlp.experts for layer in model.spec.layers)
    small = "norms, biases and routers" if routed else "norms and biases"
    return why | {small: "not quantized, for they take next to no memory"}


def _graphs(kind: Kind, streams: Streams | None) -> dict[str, str]:
    found = {}
    if isinstance(kind, GeneratingKind):
        replays, gauges = kind.replays, {} if streams is None else streams.gauges()
        found["generate"] = _road(replays.road, replays.num_graphs, replays.num_replays)
        graphs, steps = int(gauges.get("graphs", 0)), int(gauges.get("graph_replays", 0))
        found["streams"] = _road(kind.stream_road, graphs, steps)
    if (texts := kind.text_replays) is not None:
        found["texts"] = _road(texts.road, texts.num_graphs, texts.num_replays)
    return found


def _road(road: Road, num_graphs: int, num_replays: int) -> str:
    """Which one calls take."""
    if road.why_not is not None:
        return f"without: {road.why_not}"
    if not num_graphs:
        return "captured when first needed"
    return f"{num_graphs} captured, {num_replays:,} steps replayed"


def _slots(model: Model) -> dict[str, str]:
    """By slot, the op that computes it and how; what differs between layers is named once each."""
    spec = model.spec
    layers = (*(spec.encoder.layers if spec.encoder else ()), *spec.layers)
    linear = _linear(next(iter(model.projections().values()), None))
    slots = {"qkv": f"{linear}, queries, keys and values stacked"}
    if cached := [layer for layer in layers if layer.attention.causal]:
        slots["rotary"] = _each(_rotary(layer.rotary) for layer in cached)
    slots["attention"] = _each(_attention(layer.attention) for layer in layers)
    slots["out"] = linear
    if crossing := [layer.cross for layer in layers if layer.cross]:
        computed = "keys and values stacked, computed once a source and cached"
        slots["cross attention"] = f"{_each(map(_cross, crossing))}; {linear}, {computed}"
    slots["norm"] = _each(_norm(layer) for layer in layers)
    slots["mlp"] = _each(_mlp(layer.mlp, linear, model.scheme) for layer in layers)
    if spec.head is not None:
        slots["head"] = _head(spec.head, model, _linear(model.head))
    if spec.pooler:
        slots["pooler"] = f"{_linear(model.pooler)} and tanh, of each text's first token"
    return slots


def _head(spec: HeadSpec, model: Model, linear: str) -> str:
    copied = spec.tied and model.head is not None and model.head.weight is not model.embedding.weight
    transform = f"{linear}, {spec.transform.activation}, norm, " if spec.transform else ""
    tied = ", tied" if spec.tied else ""
    return transform + linear + tied + (" (packed, so a copy of the embedding)" if copied else "")


def _each(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))


def _precision(report: InferenceReport) -> str:
    return f"{report.quantized} weights, {report.dtype} activations and cache" if report.quantized else report.dtype


def _linear(part: nn.Module | None) -> str:
    if not isinstance(part, Linear):
        return "a module of your own"
    weight = part.weight
    if part.scale is not None:
        stored = next(scheme.name for scheme in SCHEMES.values() if scheme.dtype is weight.dtype)
        if weight.dtype is torch.float8_e4m3fn:
            where = "Triton" if weight.is_cuda else "dequantized for each product"
            return f"linear ({stored}, {where}; many rows are rounded to fp8, too{', for cuBLAS' * weight.is_cuda})"
        if weight.is_cuda:
            return f"linear ({stored}, Triton up to {MOST_ROWS} rows, above dequantized for cuBLAS)"
        if weight.dtype is torch.int8 and part.scale.dtype is torch.bfloat16:
            return f"linear ({stored}, multiplied as it is for few rows, above dequantized for oneDNN)"
        return f"linear ({stored}, dequantized for each product)"
    if weight.is_cuda:
        return f"linear (Triton up to {MOST_ROWS} rows, cuBLAS above)"
    return "linear (oneDNN, packed)" if weight.is_mkldnn else "linear (PyTorch)"


def _rotary(spec: RotarySpec | None) -> str:
    if spec is None:
        return "rotate_and_cache, which only fills the cache"
    pairs = "neighbours" if spec.interleaved else "halves"
    return f"rotate_and_cache, {2 * len(spec.inverse_frequencies)} values of a head, pairs are {pairs}"


def _attention(spec: AttentionSpec) -> str:
    heads = f"{spec.num_heads} heads" + (f" over {spec.num_kv_heads}" if spec.num_kv_heads != spec.num_heads else "")
    op = "paged_attention" if spec.causal else "full_attention, in both directions"
    parts = [f"{op}, {heads} of {spec.head_dim}"]
    if spec.window is not None:
        parts.append(f"window {spec.window}")
    if spec.soft_cap is not None:
        parts.append(f"soft cap {spec.soft_cap:g}")
    if spec.alibi is not None:
        parts.append("ALiBi")
    if spec.relative is not None:
        parts.append(f"relative bias in {spec.relative.num_buckets} buckets")
    if spec.qk_norm is not None:
        parts.append("norms of q and k")
    return ", ".join(parts)


def _cross(spec: AttentionSpec) -> str:
    return f"paged_attention over the source, {spec.num_heads} heads of {spec.head_dim}"


def _norm(layer: LayerSpec) -> str:
    kind = {"rms": "RMSNorm", "layer": "LayerNorm"}[layer.norm.kind]
    return f"norm, {kind}, placement {layer.placement}"


def _mlp(spec: MLPSpec, linear: str, scheme: Scheme | None) -> str:
    how = f"{spec.activation}{', gate stacked on up' if spec.gated else ''}"
    if spec.experts:
        stored = "" if scheme is None else f" ({scheme.name})"
        return f"experts{stored}, {how}, {spec.experts.per_token} of {spec.experts.count} experts a token"
    return f"activate, {how}, between {linear}"


def _size(count: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} B"
