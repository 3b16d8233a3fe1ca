"""The model shell: embedding, blocks, final norm, head. It knows no family and no checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.batch import Batch
from headrace.kernels.block import Block, Linear, Norm
from headrace.kernels.kv import KVCache
from headrace.kernels.ops.rotary import rotary_table
from headrace.kernels.spec import ModelSpec

__all__ = ["Model"]


class Model(nn.Module):
    """A decoder for ragged batches over a paged cache; built empty, its weights are filled in by a loader."""

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.spec = spec
        # On the meta device nothing is allocated or initialized: every weight is about to be read from a file.
        with torch.device("meta"):
            self.embedding = nn.Embedding(spec.vocab_size, spec.hidden_size)
            self.blocks = nn.ModuleList([Block(spec.layer, spec.hidden_size) for _ in range(spec.num_layers)])
            self.final_norm = Norm(spec.final_norm, spec.hidden_size)
            self.head = Linear(spec.hidden_size, spec.vocab_size)
        self.to(dtype).to_empty(device=device).requires_grad_(False)
        if spec.tied_head:
            assert isinstance(self.embedding.weight, nn.Parameter)
            self.head.weight = self.embedding.weight
        self._rotary = self._table(min(spec.max_positions, _FIRST_POSITIONS), torch.device(device))

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Logits [N, vocab] of the tokens that the batch wants them for; all keys and values go to the cache."""
        x = self.embedding(batch.token_ids)
        residual: Tensor | None = None
        cos_sin = self._positions(batch)
        for index, block in enumerate(self.blocks):
            x, residual = block(x, residual, cos_sin, cache.layer(index), batch)
        assert residual is not None, "a model has at least one block"
        rows = batch.logits_rows
        if len(rows) < len(x):
            x, residual = x[rows], residual[rows]
        x, _ = self.final_norm(x, residual)
        logits: Tensor = self.head(x)
        return logits

    def pack(self) -> None:
        """Bring all weights into the layout that their device multiplies fastest, once they are filled in.

        A head that is the embedding may become a copy of it: of a packed matrix no row can be looked up.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def _positions(self, batch: Batch) -> Tensor:
        """Cosines and sines of the batch's positions [T, 2, pairs]; the table grows with the longest context so far."""
        longest = max(batch.context_lens_host)
        if longest > len(self._rotary):
            self._rotary = self._table(min(self.spec.max_positions, 2 * longest), self._rotary.device)
        return self._rotary[batch.positions]

    def _table(self, num_positions: int, device: torch.device) -> Tensor:
        rotary = self.spec.layer.rotary
        return rotary_table(rotary.inverse_frequencies, num_positions, rotary.attention_factor, device)


_FIRST_POSITIONS = 8192  # a table for a million positions would be half a gigabyte
