"""What must be read and computed, at the least, counted from a model's specification. Numbers only.

Read are weights, once per step, and keys and values of what a token sees; of an embedding that is no head, single rows
are read, which count for nothing. What is written, and read again while the caches of the chip hold it, is not counted:
the floor is what no implementation can do without. Operations are those of matrix products, an addition and a
multiplication counted as two; of causal attention the half above the diagonal is not counted. Of the last layer a
prompt needs its keys and values, and the rest for its last token alone.

Of quantized weights (`headrace.kernels.quantize`) a projection's are a byte each, and a factor for each row is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.kernels.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec

__all__ = ["Ceilings", "Cost", "Costs", "num_parameters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a device can do, measured.

    Attributes:
        read: bytes per second from memory.
        matmul: operations per second of matrix products.
        fp8: likewise of products of fp8; None where nothing is computed in it.
    """

    read: float
    matmul: float
    fp8: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes read and operations done.

    Attributes:
        bytes: read.
        flops: operations.
        projected: those of them that projections of layers do, which may be of fp8.
        attention: the part of attention in both: keys and values read, and operations with them; None for no part.
    """

    bytes: float = 0.0
    flops: float = 0.0
    projected: float = 0.0
    attention: Cost | None = None

    def __add__(self, other: Cost) -> Cost:
        parts = [cost.attention for cost in (self, other) if cost.attention is not None]
        return Cost(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.projected + other.projected,
            parts[0] + parts[1] if len(parts) == 2 else next(iter(parts), None),
        )

    def __mul__(self, factor: float) -> Cost:
        attention = None if self.attention is None else self.attention * factor
        return Cost(self.bytes * factor, self.flops * factor, self.projected * factor, attention)

    @property
    def matmul(self) -> Cost:
        """The part of matrix products: all but attention."""
        attention = self.attention or Cost()
        return Cost(self.bytes - attention.bytes, self.flops - attention.flops, self.projected)

    def reading(self, ceilings: Ceilings) -> float:
        """Seconds that reading takes at the least."""
        return self.bytes / ceilings.read

    def computing(self, ceilings: Ceilings) -> float:
        """Seconds that the operations take at the least."""
        projected = self.projected / (ceilings.matmul if ceilings.fp8 is None else ceilings.fp8)
        return projected + (self.flops - self.projected) / ceilings.matmul

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time: reading and computing overlap, so it is the longer of the two."""
        return max(self.reading(ceilings), self.computing(ceilings))


@dataclass(frozen=True, slots=True)
class _Weights:
    """A number of weights.

    Attributes:
        count: all of them.
        narrow: those of projections, which are kept in 8 bits where a model is quantized.
        factors: of the rows of these, which are read besides, where it is.
    """

    count: float = 0
    narrow: float = 0
    factors: float = 0

    def __add__(self, other: _Weights) -> _Weights:
        return _Weights(self.count + other.count, self.narrow + other.narrow, self.factors + other.factors)

    def __mul__(self, times: float) -> _Weights:
        return _Weights(self.count * times, self.narrow * times, self.factors * times)


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one model in one precision.

    Attributes:
        spec: of the model.
        itemsize: bytes of one weight, key or value.
        quantized: whether the weights of the layers' projections are a byte each instead, with factors of `itemsize`.
    """

    spec: ModelSpec
    itemsize: int
    quantized: bool = False

    def step(self, batch: int, context: float, source: float = 0.0) -> Cost:
        """One step in which `batch` sequences decode a token each, every one seeing `context` tokens, itself included,
        and, in an encoder-decoder, `source` tokens of its text."""
        weights = sum((_read_by(layer, self.spec.hidden_size, batch) for layer in self.spec.layers), _Weights())
        projected = 2 * batch * sum(_used_by(layer, self.spec.hidden_size) for layer in self.spec.layers)
        seen = self.context(context, source)
        read = self._bytes(weights) + self._head() * self.itemsize
        return Cost(read, projected + 2 * batch * self._head(), projected) + _attended(seen * batch)

    def context(self, context: float, source: float = 0.0) -> Cost:
        """Keys and values that one token sees, in all layers."""
        read = flops = 0.0
        for layer in self.spec.layers:
            for attention, length in ((layer.attention, context), (layer.cross, source)):
                if attention is not None:
                    seen = length if attention.window is None else min(length, attention.window)
                    read += 2 * attention.num_kv_heads * attention.head_dim * seen * self.itemsize
                    flops += 4 * attention.num_heads * attention.head_dim * seen
        return Cost(read, flops)

    def prompts(self, batch: int, length: int) -> Cost:
        """`batch` prompts of `length` tokens each, up to their first tokens; of an encoder-decoder, its texts."""
        if self.spec.encoder is not None:
            return self._texts(self.spec.encoder.layers, batch, length) + self._sources(batch, length)
        cost = self._texts(self.spec.layers, batch, length, wanted=batch)
        return cost + Cost(self._head() * self.itemsize, 2 * self._head() * batch)

    def texts(self, batch: int, length: int) -> Cost:
        """`batch` whole texts of `length` tokens each, through an encoder."""
        return self._texts(self.spec.layers, batch, length)

    def _texts(self, layers: tuple[LayerSpec, ...], batch: int, length: int, *, wanted: int | None = None) -> Cost:
        """Of the tokens, only so many, the last ones of texts, are wanted behind the last layer; None for all."""
        tokens, hidden = batch * length, self.spec.hidden_size
        cost = Cost()
        for index, layer in enumerate(layers):
            attention = layer.attention
            left = tokens if wanted is None or index < len(layers) - 1 else wanted
            seen = length if attention.window is None else min(length, attention.window)
            pairs = batch * (length * seen - (seen * seen / 2 if attention.causal else 0))
            projected = 2 * tokens * _used_by(layer, hidden)
            if left < tokens:
                pairs = left * seen
                projected -= 2 * (tokens - left) * (_used_by(layer, hidden) - _key_value(attention, hidden).count)
            cost += Cost(self._bytes(_read_by(layer, hidden, left)), projected, projected)
            cost += _attended(Cost(flops=4 * attention.num_heads * attention.head_dim * pairs))
        return cost

    def _sources(self, batch: int, length: int) -> Cost:
        """What is made of an encoder's states for the layers that look across, and the first token's step."""
        crossed = (layer.cross for layer in self.spec.layers if layer.cross)
        made = sum((_key_value(cross, self.spec.hidden_size) for cross in crossed), _Weights())
        projected = 2 * made.count * batch * length
        return Cost(self._bytes(made), projected, projected) + self.step(batch, 1, length)

    def _bytes(self, weights: _Weights) -> float:
        """Of some weights, as they are kept."""
        if not self.quantized:
            return weights.count * self.itemsize
        return weights.narrow + (weights.count - weights.narrow + weights.factors) * self.itemsize

    def _head(self) -> int:
        """Weights between the last hidden state and the logits."""
        return _last(self.spec) if self.spec.head is not None else _norm(self.spec.final_norm, self.spec.hidden_size)


def _attended(cost: Cost) -> Cost:
    """A cost that is all of attention."""
    return Cost(cost.bytes, cost.flops, attention=cost)


def num_parameters(spec: ModelSpec) -> int:
    """All of a model's, a tied head counted once."""
    hidden, embedding = spec.hidden_size, spec.embedding
    count = spec.vocab_size * embedding.size
    count += hidden * embedding.positions.count if embedding.positions else 0
    count += hidden * embedding.token_types + _norm(embedding.norm, hidden)
    count += hidden * embedding.size if embedding.size != hidden else 0
    count += sum(_layer(layer, hidden) for layer in spec.layers) + _relative(spec.layers)
    if spec.encoder is not None:
        layers = spec.encoder.layers
        count += sum(_layer(layer, hidden) for layer in layers) + _relative(layers)
        count += _norm(spec.encoder.final_norm, hidden)
    count += _last(spec) if spec.head is not None else _norm(spec.final_norm, hidden)
    count -= spec.vocab_size * embedding.size if spec.head is not None and spec.head.tied else 0
    return count + (_linear(hidden, hidden, True) if spec.pooler else 0)


def _last(spec: ModelSpec) -> int:
    hidden, size, head = spec.hidden_size, spec.embedding.size, spec.head
    assert head is not None
    count = _linear(size, spec.vocab_size, head.bias) + _norm(spec.final_norm, hidden)
    count += hidden * size if size != hidden else 0
    if head.transform is not None:
        count += _linear(hidden, hidden, True) + _norm(head.transform.norm, hidden)
    return count


def _layer(layer: LayerSpec, hidden: int) -> int:
    """All parameters of one layer."""
    weights = _attention(layer, hidden) + (_key_value(layer.cross, hidden) if layer.cross else _Weights())
    experts = layer.mlp.experts
    return round((weights + _mlp(layer.mlp, hidden, 1 if experts is None else experts.count)).count)


def _read_by(layer: LayerSpec, hidden: int, tokens: int) -> _Weights:
    """Weights of one layer that `tokens` tokens need; of experts, as many as tokens that choose at random choose."""
    experts, asked = layer.mlp.experts, 1.0
    if experts is not None:
        asked = experts.count * (1 - (1 - experts.per_token / experts.count) ** tokens)
    return _attention(layer, hidden) + _mlp(layer.mlp, hidden, asked)


def _used_by(layer: LayerSpec, hidden: int) -> float:
    """Weights of one layer that one token is multiplied with."""
    experts = layer.mlp.experts
    return (_attention(layer, hidden) + _mlp(layer.mlp, hidden, 1 if experts is None else experts.per_token)).count


def _attention(layer: LayerSpec, hidden: int) -> _Weights:
    """Attention and norms; of attention across, what a decoded token needs."""
    attention = layer.attention
    norms = (1 if layer.shared_norm else 2) + (2 if layer.placement == "sandwich" else 0)
    weights = _Weights(norms * _norm(layer.norm, hidden) + 2 * _norm(attention.qk_norm, attention.head_dim))
    weights += _projection(hidden, attention.qkv_size, attention.qkv_bias)
    weights += _projection(attention.num_heads * attention.head_dim, hidden, attention.out_bias)
    if (cross := layer.cross) is not None:
        inner = cross.num_heads * cross.head_dim
        weights += _Weights(_norm(layer.norm, hidden))
        weights += _projection(hidden, inner, cross.qkv_bias) + _projection(inner, hidden, cross.out_bias)
    return weights


def _key_value(attention: AttentionSpec, hidden: int) -> _Weights:
    """What makes the keys and values."""
    return _projection(hidden, 2 * attention.num_kv_heads * attention.head_dim, attention.qkv_bias)


def _mlp(mlp: MLPSpec, hidden: int, asked: float) -> _Weights:
    rows = mlp.size * (2 if mlp.gated else 1)
    one = _projection(hidden, rows, mlp.bias) + _projection(mlp.size, hidden, mlp.bias)
    if mlp.experts is None:
        return one
    return one * asked + _Weights(hidden * mlp.experts.count)  # and the router, which stays as it is


def _relative(layers: tuple[LayerSpec, ...]) -> int:
    attention = layers[0].attention
    return attention.relative.num_buckets * attention.num_heads if attention.relative else 0


def _projection(in_size: int, out_size: int, bias: bool) -> _Weights:
    return _Weights(_linear(in_size, out_size, bias), in_size * out_size, out_size)


def _linear(in_size: int, out_size: int, bias: bool) -> int:
    return in_size * out_size + (out_size if bias else 0)


def _norm(norm: NormSpec | None, size: int) -> int:
    if norm is None or not norm.affine:
        return 0
    return size * (2 if norm.kind == "layer" else 1)
