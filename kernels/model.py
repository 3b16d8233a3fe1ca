"""The model shell: embedding, blocks, final norm, head. It knows no family and no checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.batch import Batch
from headrace.kernels.block import Block
from headrace.kernels.kv import KVCache
from headrace.kernels.linear import Linear
from headrace.kernels.norm import Norm
from headrace.kernels.ops.embedding import embed
from headrace.kernels.ops.rotary import rotary_table
from headrace.kernels.quantize import Scheme
from headrace.kernels.spec import EncoderSpec, LayerSpec, ModelSpec, RotarySpec
from headrace.kernels.weight import Weight

__all__ = ["Encoder", "Model"]

_FIRST_POSITIONS = 8192  # if nobody says how many: a table for a million positions would be half a gigabyte


class Encoder(nn.Module):
    """The blocks that read the source of an encoder-decoder."""

    def __init__(self, spec: EncoderSpec, hidden_size: int) -> None:
        super().__init__()
        self.relative = _relative_table(spec.layers)
        self.blocks = nn.ModuleList([Block(layer, hidden_size) for layer in spec.layers])
        self.final_norm = Norm(spec.final_norm, hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """States [T, hidden] of embedded tokens [T, hidden], which are lost."""
        table = None if self.relative is None else self.relative.weight
        for block in self.blocks:
            x = block(x, batch, cache=None, table=table)
        states: Tensor = self.final_norm(x)
        return states


def _relative_table(layers: tuple[LayerSpec, ...]) -> nn.Embedding | None:
    """The table of relative biases that all layers share, if they have one."""
    attention = layers[0].attention
    return _embedding(attention.relative.num_buckets, attention.num_heads) if attention.relative else None


def _embedding(count: int, size: int) -> nn.Embedding:
    """An empty table; nn.Embedding's own would be drawn at random, for which, on the meta device, torch imports its
    compiler: half a second of every start."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(count, size))  # type: ignore[no-untyped-call]
    return table


class Model(nn.Module):
    """A decoder over a paged cache, or an encoder, for ragged batches; built empty, to be filled by a loader."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scheme: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.scheme = scheme
        # On the meta device nothing is allocated or initialized: every weight is about to be read from a file.
        with torch.device("meta"):
            self._build(spec)
            if scheme is not None:
                for projection in self.projections().values():
                    projection.quantize(scheme)
        # Not `to_empty`: on its way from the meta device torch imports its symbolic shapes: a quarter of a second here.
        parts = [(part, tensor) for part in self.projections().values() for tensor in (part.weight, part.scale)]
        kept = {id(tensor) for part, tensor in parts if tensor is not None and part.keeps(tensor)}

        def allocated(blank: Tensor) -> Tensor:
            return torch.empty(blank.shape, dtype=blank.dtype if id(blank) in kept else dtype, device=device)

        self._apply(allocated)  # type: ignore[no-untyped-call]
        self.requires_grad_(False)
        if spec.head is not None and spec.head.tied:
            assert self.head is not None
            assert isinstance(self.embedding.weight, nn.Parameter)
            self.head.weight = self.embedding.weight
        # As narrow as the weights, like the product it goes into.
        self._embedding_scale = float(torch.tensor(spec.embedding.scale, dtype=dtype))
        self._tables: dict[RotarySpec, Tensor] = {}

    def _build(self, spec: ModelSpec) -> None:
        hidden, embedding = spec.hidden_size, spec.embedding
        projected = embedding.size != hidden
        self.embedding = _embedding(spec.vocab_size, embedding.size)
        self.embedding_in = Linear(embedding.size, hidden) if projected else None
        self.positions = _embedding(embedding.positions.count, hidden) if embedding.positions else None
        self.token_types = _embedding(embedding.token_types, hidden) if embedding.token_types else None
        self.embedding_norm = Norm(embedding.norm, hidden) if embedding.norm else None
        self.blocks = nn.ModuleList([Block(layer, hidden) for layer in spec.layers])
        self.final_norm = Norm(spec.final_norm, hidden) if spec.final_norm else None
        self.embedding_out = Linear(hidden, embedding.size) if projected else None
        self.relative = _relative_table(spec.layers)
        self.encoder = Encoder(spec.encoder, hidden) if spec.encoder else None
        transform = spec.head.transform if spec.head else None
        self.head_dense = Linear(hidden, hidden, bias=True) if transform else None
        self.head_norm = Norm(transform.norm, hidden) if transform else None
        self.head = Linear(embedding.size, spec.vocab_size, bias=spec.head.bias) if spec.head else None
        self.pooler = Linear(hidden, hidden, bias=True) if spec.pooler else None

    def forward(self, batch: Batch, cache: KVCache | None) -> Tensor:
        """Logits [N, vocab] of the tokens that the batch wants them for; all keys and values go to the cache."""
        return self.logits(self.hidden(batch, cache, batch.logits_rows))

    def hidden(self, batch: Batch, cache: KVCache | None, rows: Tensor | None = None) -> Tensor:
        """The last hidden states [N, hidden] of the tokens `rows`, by default of all."""
        x = self._embed(batch)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = block(
                x,
                batch,
                cache=None if cache is None else cache.layer(index),
                cos_sin=self._cos_sin(self.spec.layers[index].rotary, batch),
                table=None if self.relative is None else self.relative.weight,
                rows=rows if index == last else None,
            )
        return x if self.final_norm is None else self.final_norm(x)

    def encode(self, batch: Batch, cache: KVCache) -> None:
        """Read sources with the encoder, and put what the decoder's layers see of them into the batch's slots."""
        self.remember(self.encoded(batch), batch.slots, cache)

    def encoded(self, batch: Batch) -> Tensor:
        """The encoder's states [T, hidden] of sources."""
        assert self.encoder is not None, "the model has no encoder"
        states: Tensor = self.encoder(embed(batch.token_ids, self.embedding.weight), batch)
        return states

    def remember(self, states: Tensor, slots: Tensor, cache: KVCache) -> None:
        """Put what the decoder's layers see of an encoder's states [T, hidden] into slots [T]."""
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            assert block.cross is not None
            block.cross.remember(states, slots, cache.layer(index))

    def logits(self, x: Tensor) -> Tensor:
        """Logits [N, vocab] of last hidden states [N, hidden]."""
        spec = self.spec.head
        assert spec is not None, "the model has no head"
        assert self.head is not None
        if spec.scale != 1.0:
            x = x * spec.scale
        if spec.transform is not None:
            assert self.head_dense is not None
            assert self.head_norm is not None
            x = self.head_norm(self.head_dense(x, activation=spec.transform.activation))
        if self.embedding_out is not None:
            x = self.embedding_out(x)
        logits: Tensor = self.head(x)
        if spec.soft_cap is not None:
            logits = torch.tanh(logits / spec.soft_cap) * spec.soft_cap
        return logits

    def pooled(self, x: Tensor) -> Tensor:
        """What the pooler makes of the first tokens' last hidden states [N, hidden]."""
        assert self.pooler is not None, "the model has no pooler"
        return torch.tanh(self.pooler(x))

    def projections(self) -> dict[str, Weight]:
        """Those of layers, which may be quantized, by name; the stacks of experts are some."""
        parts = {name: part for name, part in self.named_modules() if isinstance(part, Weight)}
        return {name: part for name, part in parts.items() if "blocks." in name and not name.endswith(".router")}

    def scales(self) -> dict[str, Tensor]:
        """Of each weight that is quantized, by the weight's name, the factors of its rows."""
        found = {f"{name}.weight": part.scale for name, part in self.projections().items()}
        return {name: scale for name, scale in found.items() if scale is not None}

    def pack(self) -> None:
        """Bring all weights into the layout that their device multiplies fastest, once they are filled in.

        A head that is the embedding may become a copy of it: of a packed matrix no row can be looked up.
        """
        for module in list(self.modules()):
            if isinstance(module, Weight):
                module.pack()
        self.fold()

    def fold(self) -> None:
        """Note what follows from the weights, once they are all there, and whenever they were changed."""
        for module in self.modules():
            if isinstance(module, Block):
                module.fold()

    def reserve_positions(self, count: int) -> None:
        """Make the tables of rotary positions for contexts of so many tokens; at most for those it was made for.

        Up to there steps allocate nothing and wait for nothing. Tables of more positions stay as they are.
        """
        count = min(self.spec.max_positions, count)
        device = self.embedding.weight.device
        for rotary in {layer.rotary for layer in self.spec.layers if layer.rotary is not None}:
            table = self._tables.get(rotary)
            if table is None or len(table) < count:
                self._tables[rotary] = rotary_table(rotary, count, device)

    @property
    def rotary_tables(self) -> tuple[Tensor, ...]:
        """The tables of rotary positions as they are now; larger ones may take their place."""
        return tuple(self._tables.values())

    def _embed(self, batch: Batch) -> Tensor:
        positions = self.spec.embedding.positions
        position_table = None if self.positions is None else self.positions.weight
        projected = self.embedding_in is not None
        x = embed(
            batch.token_ids,
            self.embedding.weight,
            scale=self._embedding_scale,
            positions=batch.positions,
            position_table=None if projected else position_table,
            offset=0 if positions is None else positions.offset,
            segments=batch.token_types,
            segment_table=None if self.token_types is None else self.token_types.weight,
        )
        if self.embedding_in is not None:
            assert self.token_types is None, "segments are not projected"
            x = self.embedding_in(x)
            if positions is not None and position_table is not None:
                x = x + embed(batch.positions + positions.offset, position_table)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x

    def _cos_sin(self, rotary: RotarySpec | None, batch: Batch) -> Tensor | None:
        """Cosines and sines of the batch's positions [T, 2, pairs], the same for all layers that rotate alike."""
        if rotary is None:
            return None
        return batch.shared(rotary, lambda: self._rotary_table(rotary, batch)[batch.positions])

    def _rotary_table(self, rotary: RotarySpec, batch: Batch) -> Tensor:
        """Cosines and sines of all reserved positions, and of as many as the longest context needs, and then some."""
        longest = max(batch.context_lens_host)
        table = self._tables.get(rotary)
        if table is None or longest > len(table):
            self.reserve_positions(max(_FIRST_POSITIONS, 2 * longest))
            table = self._tables[rotary]
        return table
