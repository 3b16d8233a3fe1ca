"""Quantized tiny models, and their oracles: plain models of the numbers for which the 8 bits stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.kernels.inject import config_of
from headrace.kernels.model import Model
from headrace.kernels.policies import find_policy
from headrace.kernels.quantize import SCHEMES, Scheme, store
from headrace.workers.loader import load_model
from tests.support.tiny_encoders import make_any

__all__ = ["blank_model", "meant_by", "rounded", "same_bytes", "unpacked"]


def blank_model(name: str, scheme: Scheme | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """The model of a family without memory."""
    module = make_any(name)
    spec = find_policy(type(module).__name__).spec(config_of(module))
    return Model(spec, dtype=dtype, device="meta", scheme=scheme)


def unpacked(folder: Path, **options: Any) -> Model:
    """A model whose weights can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "pack", lambda model: None)
        return load_model(folder, **options)


def meant_by(quantized: Model) -> Model:
    """A plain model of the same dtype whose layers have what a quantized one's 8 bits stand for; neither is packed."""
    dtype = quantized.embedding.weight.dtype
    plain = Model(quantized.spec, dtype=dtype)
    scales = quantized.scales()
    given = dict(quantized.named_parameters(remove_duplicate=False))
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        exact = given[name].double()
        parameter.data.copy_(exact * scales[name].double()[..., None] if name in scales else exact)
    return plain


def rounded(module: Any, name: str) -> Any:
    """A module of transformers, the products of its layers rounded to what 8 bits hold. It knows nothing of our
    layouts: a row of theirs is a row of ours, wherever it is stacked."""
    scheme = SCHEMES[name]
    for place, part in module.named_modules():
        if re.search(r"\.\d+\.", place) and (isinstance(part, torch.nn.Linear) or type(part).__name__ == "Conv1D"):
            _round(part.weight.data if isinstance(part, torch.nn.Linear) else part.weight.data.T, scheme)
        for stack in (getattr(part, "gate_up_proj", None), getattr(part, "down_proj", None)):
            if isinstance(stack, torch.nn.Parameter):  # the experts of a layer
                _round(stack.data.flatten(0, 1), scheme)
    return module


def _round(rows: torch.Tensor, scheme: Scheme) -> None:
    values, scale = torch.empty_like(rows, dtype=scheme.dtype), rows.new_empty(len(rows), dtype=scheme.factors)
    store(rows, values, scale)
    rows.copy_(values.to(rows.dtype) * scale[:, None])


def same_bytes(first: Model, other: Model) -> bool:
    """Whether two models hold the same numbers, factors included."""
    ours, theirs = dict(first.named_parameters()) | first.scales(), dict(other.named_parameters()) | other.scales()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype is theirs[name].dtype and torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8))
        for name, tensor in ours.items()
    )
