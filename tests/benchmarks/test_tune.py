"""Tuning: which products layers ask for, and that what is tried is forgotten afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headrace.benchmarks.tune import candidates_of, products_of
from headrace.benchmarks.tune_layers import _table, has_layers, settled
from headrace.kernels import tuning
from headrace.kernels.tuning import LinearShape, Tiles


def row_of(shape, tiles):
    return dataclasses.asdict(shape) | dataclasses.asdict(tiles)


def test_tiles_that_are_tried_take_the_place_of_stored_ones():
    stored = dict(tuning.read_table("nvidia-h200.json"))
    shape, other = list(stored)[:2]
    tried = Tiles("gemv", block_n=1, block_k=128, warps=1)
    assert stored[shape] != tried
    with _table({shape: row_of(shape, tried)}) as asked:
        table = tuning.read_table("nvidia-h200.json")
        assert table.get(shape) == tried
        assert table.get(other) == stored[other]
        assert tuning.read_table("nvidia-none.json").get(other) is None
    assert asked == [shape, other, other]
    assert tuning.read_table("nvidia-h200.json") == stored


@pytest.mark.parametrize(
    ("name", "layers"), [("llama-8b", True), ("falcon-7b", True), ("t5-3b", False), ("bert-large", False)]
)
def test_layers_of_decoders_alone_are_asked(name, layers):
    assert has_layers(name) is layers


@pytest.mark.gpu
def test_layers_choose_among_finalists():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    finalists = {}
    for found in products_of("qwen-0.5b"):
        ways = [way for way in candidates_of(found, 1) if way.tiles.block_n > 2][:2]
        finalists[ways[0].shape] = [row_of(way.shape, way.tiles) for way in ways]
    head = max(finalists, key=lambda shape: shape.n)
    finalists[LinearShape(1, 8, 8, False, 2)] = finalists[head]  # nobody's
    before = dict(tuning.read_table(tuning.table_name(torch.cuda.get_device_name())))
    chosen = list(settled("qwen-0.5b", 1, finalists))
    assert {shape for shape, _, _ in chosen} == finalists.keys() - {head, LinearShape(1, 8, 8, False, 2)}
    assert all(row in finalists[shape] and saved < 1 for shape, row, saved in chosen)
    assert tuning.read_table(tuning.table_name(torch.cuda.get_device_name())) == before
