"""Which tiles a product gets: those that are stored for its GPU, otherwise those that are guessed."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources

import pytest
import torch

from headrace.kernels import tuning
from headrace.kernels.tuning import LinearShape, Tiles, guess, parse_table, read_table, row_bucket, table_name

H200 = {"processors": 132, "shared_memory": 227 * 1024}
SMALL = {"processors": 40, "shared_memory": 64 * 1024}  # a Turing

# Sizes of Llama-3.1-8B, GPT-2 XL and Falcon-7B, a vocabulary, and of a model for tests.
SIZES = [(6144, 4096), (4096, 14336), (1600, 1600), (4544, 18176), (250880, 4096), (7, 24)]


def tables() -> list[dict]:
    folder = resources.files("headrace.kernels") / "tuned"
    return [json.loads(file.read_text()) for file in folder.iterdir() if file.name.endswith(".json")]


def fits(shape: LinearShape, tiles: Tiles) -> bool:
    """Whether a kernel can be launched so."""
    if tiles.kernel == "torch":
        return True
    powers = all(size & (size - 1) == 0 for size in (tiles.block_n, tiles.block_k, tiles.warps))
    if tiles.kernel == "gemv":
        return powers and shape.rows <= tuning.GEMV_ROWS and tiles.block_k * shape.itemsize >= 16
    if tiles.kernel == "keep":
        fit = shape.rows == 1 and shape.k <= tiles.block_k < 2 * shape.k and shape.k <= tuning.KEPT
        return powers and fit and tiles.programs >= 1
    tiles_of_part = math.ceil(math.ceil(shape.k / tiles.block_k) / tiles.splits)
    no_part_is_empty = tiles_of_part * (tiles.splits - 1) * tiles.block_k < shape.k
    powers &= tiles.block_m & (tiles.block_m - 1) == 0 and tiles.block_m <= shape.rows
    return powers and shape.itemsize < 4 and tiles.block_n >= 16 and tiles.block_k >= 16 and no_part_is_empty


@pytest.mark.parametrize("gpu", [H200, SMALL], ids=["h200", "small"])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("size", SIZES)
def test_a_guess_fits(size, rows, gated, itemsize, gpu):
    shape = LinearShape(rows, *size, gated, itemsize)
    tiles = guess(shape, **gpu)
    assert fits(shape, tiles)
    if tiles.kernel == "skinny":
        block_m = tiles.block_m or rows
        stage = (tiles.block_n * (2 if gated else 1) + max(16, block_m)) * tiles.block_k * itemsize
        assert tiles.stages == 2 or tiles.stages * stage <= gpu["shared_memory"]
        programs = tiles.splits * -(-size[0] // tiles.block_n) * -(-rows // block_m)
        assert tiles.splits == 1 or programs <= gpu["processors"]


@pytest.mark.parametrize("size", [(1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)])  # of BERT-large
def test_a_guess_for_many_rows_and_a_small_weight_fills_a_gpu(size):
    tiles = guess(LinearShape(128, *size, False, 2), **H200)
    assert tiles.kernel == "skinny"
    assert 90 <= tiles.splits * (size[0] // tiles.block_n) * (128 // tiles.block_m) <= H200["processors"]


def test_what_is_stored_fits():
    assert tables()
    for table in tables():
        assert table.keys() >= {"gpu", "torch", "triton", "date", "linear"}
        tiles = parse_table(table)
        assert len(tiles) == len(table["linear"]), "no shape is there twice"
        assert all(fits(shape, found) for shape, found in tiles.items())
        assert all(row_bucket(shape.rows) == shape.rows for shape in tiles)


def test_every_table_has_the_name_of_its_gpu():
    for table in tables():
        assert read_table(table_name(table["gpu"])) == parse_table(table)


def test_what_is_not_stored_is_guessed(monkeypatch):
    stored, other = LinearShape(1, 512, 256, False, 2), LinearShape(1, 512, 264, False, 2)
    int8, fp8 = (LinearShape(1, 512, 256, False, 1, fp8=fp8) for fp8 in (False, True))
    only_int8 = LinearShape(1, 264, 256, False, 1)
    best = Tiles("gemv", 16, 256, 1)
    table = {stored: best, int8: Tiles("gemv", 2, 256, 1), fp8: Tiles("gemv", 4, 256, 1), only_int8: best}

    class Gpu:
        name = "NVIDIA X1"
        multi_processor_count = H200["processors"]
        shared_memory_per_block_optin = H200["shared_memory"]

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: Gpu)
    monkeypatch.setattr(tuning, "read_table", lambda name: table if name == "nvidia-x1.json" else {})
    tuning.tiles_for.cache_clear()
    try:
        assert tuning.tiles_for(stored, torch.device("cuda:0")) == best
        assert tuning.tiles_for(other, torch.device("cuda:0")) == guess(other, **H200)
        assert tuning.tiles_for(int8, torch.device("cuda:0")) == table[int8]
        assert tuning.tiles_for(fp8, torch.device("cuda:0")) == table[fp8]
        assert tuning.tiles_for(dataclasses.replace(only_int8, fp8=True), torch.device("cuda:0")) == best
    finally:
        tuning.tiles_for.cache_clear()


def test_a_gpu_without_a_table_has_none_stored():
    assert read_table(table_name("No Such GPU")) == {}


def test_rows_are_rounded_up():
    assert [row_bucket(rows) for rows in (1, 2, 3, 5, 16, 17, 33, 65, 128)] == [1, 2, 4, 16, 16, 32, 64, 128, 128]
    assert row_bucket(129) == row_bucket(256) == tuning.MOST_ROWS
