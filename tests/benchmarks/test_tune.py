"""Tuning: what is tried can be launched and is forgotten afterwards, and which products layers ask for."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from headrace.benchmarks.models import spec_of
from headrace.benchmarks.shapes import find_source
from headrace.benchmarks.tune import MODELS, Bench, _line, write_table
from headrace.benchmarks.tune_layers import _fill, _table, has_layers, settled
from headrace.benchmarks.tune_ways import Product, candidates_of, products_of
from headrace.kernels import tuning
from headrace.kernels.model import Model
from headrace.kernels.quantize import find_scheme
from headrace.kernels.spec import NormSpec
from headrace.kernels.tuning import GEMV_ROWS, MOST_ROWS, LinearShape, Tiles, parse_table, row_bucket

ROWS = [1, 2, 4, 16, 32, 64, 128, 256]
BERT = [Product(n, k, False) for n, k in ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))]
LLAMA = [Product(6144, 4096, False), Product(14336, 4096, True)]
NORM = NormSpec(kind="rms", eps=1e-5)
NARROW = [dataclasses.replace(found, scheme="int8", norm=NORM) for found in (*BERT, *LLAMA)]


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(multi_processor_count=132))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("found", [*BERT, *LLAMA, *NARROW], ids=str)
@pytest.mark.usefixtures("h200")
def test_every_candidate_can_be_launched(found, rows):
    itemsize = found.itemsize
    tried = [way.tiles for way in candidates_of(found, rows)]
    assert len(set(tried)) == len(tried) > 1
    for tiles in tried:
        assert row_bucket(rows) == rows <= MOST_ROWS
        assert tiles.kernel != "gemv" or rows <= GEMV_ROWS
        if tiles.kernel == "skinny":
            assert max(16, tiles.block_m or rows) <= max(16, rows)
            assert (tiles.splits - 1) * -(-found.k // tiles.block_k // tiles.splits) * tiles.block_k < found.k
            height = tiles.block_n * (2 if found.gated else 1)
            size = height * itemsize + max(16, tiles.block_m or rows) * 2
            assert (tiles.stages - 1) * size * tiles.block_k <= 227 * 1024
        elif tiles.kernel != "torch":
            height = tiles.block_n * (2 if found.gated else 1)
            assert 32 <= height * tiles.block_k * itemsize // (32 * tiles.warps) <= 128, "bytes that a thread loads"
            assert tiles.kernel != "keep" or found.k <= tiles.block_k < 2 * found.k


@pytest.mark.parametrize("found", BERT, ids=str)
@pytest.mark.usefixtures("h200")
def test_many_rows_of_a_small_weight_are_cut_until_a_gpu_is_full(found):
    tried = [way.tiles for way in candidates_of(found, 128) if way.tiles.kernel == "skinny"]
    programs = [-(-found.n // t.block_n) * -(-128 // (t.block_m or 128)) * t.splits for t in tried]
    assert sum(90 <= count <= 132 for count in programs) >= 6
    assert {tiles.early for tiles in tried} == {tiles.ahead for tiles in tried} == {False, True}


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.usefixtures("h200")
def test_threads_load_as_much_of_weights_in_8_bits(rows):
    """16 of them are a load, so depths go up to twice those of 16 bits; what those are is tried too."""
    wide, narrow = (
        {(way.tiles.block_k, way.tiles.warps) for way in candidates_of(found, rows) if way.tiles.kernel == "gemv"}
        for found in (LLAMA[0], NARROW[len(BERT)])
    )
    assert wide < narrow
    assert {(512, 1), (2048, 4), (4096, 8)} <= narrow
    assert max(block_k for block_k, _ in wide) < 4096


@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("found", NARROW[len(BERT) :], ids=str)
@pytest.mark.usefixtures("h200")
def test_many_rows_of_weights_in_8_bits_have_large_tiles(found, rows):
    """A library would need the whole weight in 16 bits first."""
    tried = {(way.tiles.block_m or rows, way.tiles.block_n) for way in candidates_of(found, rows)}
    assert {(64, 64), (64, 128), (128, 64), (rows, 64)} <= tried
    assert any(way.tiles.kernel == "torch" for way in candidates_of(found, rows))
    warps = {way.tiles.warps for way in candidates_of(found, rows) if way.tiles.kernel == "skinny"}
    assert warps == {4, 8}


@pytest.mark.usefixtures("h200")
def test_rows_of_the_table_say_how_wide_weights_are():
    of = (LLAMA[0], NARROW[len(BERT)], dataclasses.replace(NARROW[len(BERT)], scheme="fp8"))
    [wide], [int8], [fp8] = ({way.shape for way in candidates_of(found, 1)} for found in of)
    size = (1, 6144, 4096, False)
    assert (wide, int8, fp8) == (LinearShape(*size, 2), LinearShape(*size, 1), LinearShape(*size, 1, fp8=True))


@pytest.mark.parametrize(
    ("n", "rows", "ours"), [(6144, 1, True), (6144, 64, True), (6144, 128, False), (1111, 128, True)]
)
@pytest.mark.usefixtures("h200")
def test_what_is_multiplied_as_fp8_is_left_to_a_library(n, rows, ours):
    """Many rows, if the library has a product of that size."""
    assert bool(list(candidates_of(Product(n, 4096, False, scheme="fp8"), rows))) is ours
    assert list(candidates_of(Product(n, 4096, False, scheme="int8"), rows))


@pytest.mark.parametrize("name", ["llama-8b", "gpt2-xl", "bert-large"])
def test_heads_stay_in_16_bits(name):
    wide, narrow = list(products_of(name)), list(products_of(name, "int8"))
    assert {found.itemsize for found in wide} == {2}
    assert {found.itemsize for found in narrow} == {1}
    assert [(found.n, found.k) for found in narrow] == [(found.n, found.k) for found in wide[:-1]]
    assert wide[-1].n > 30_000


def test_products_of_a_model_are_known():
    assert "bert-large" in MODELS
    assert {(found.n, found.k) for found in BERT} <= {(found.n, found.k) for found in products_of("bert-large")}


def test_a_line_tells_the_tiles():
    row = {"rows": 128, "n": 1024, "k": 1024, "gated": False, "us": 3.0, "gb_s": 700, "kernel": "skinny"}
    row |= {"block_n": 64, "block_k": 128, "warps": 4, "stages": 3, "splits": 4}
    assert _line(row | {"block_m": 64, "early": False, "ahead": True}).endswith("4 parts, 64 rows, ahead")
    assert _line(row | {"block_m": 0, "early": True, "ahead": False}).endswith("4 parts, early")


def row_of(shape, tiles):
    return dataclasses.asdict(shape) | dataclasses.asdict(tiles)


def test_rows_of_a_table_stay_with_their_day_until_they_are_measured_anew(tmp_path, monkeypatch):
    path = tmp_path / "tuned" / "gpu.json"
    rows = [row_of(LinearShape(count, 64, 64, gated=False, itemsize=2), Tiles("torch")) for count in (2, 1)]
    monkeypatch.setattr("time.strftime", lambda _: "2026-01-01")
    write_table(path, "GPU", rows)
    monkeypatch.setattr("time.strftime", lambda _: "2026-01-02")
    write_table(path, "GPU", [row_of(LinearShape(2, 64, 64, gated=False, itemsize=2), Tiles("gemv", 4, 64))])
    table = json.loads(path.read_text())
    found = [(row["rows"], row["kernel"], row["date"]) for row in table["linear"]]
    assert found == [(1, "torch", "2026-01-01"), (2, "gemv", "2026-01-02")]
    assert (table["gpu"], table["date"]) == ("GPU", "2026-01-02")
    assert set(parse_table(table).values()) == {Tiles("torch"), Tiles("gemv", 4, 64)}


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
    ("name", "layers"), [("llama-8b", True), ("falcon-7b", True), ("t5-3b", False), ("bert-large", True)]
)
def test_layers_of_one_model_alone_are_asked(name, layers):
    assert has_layers(name) is layers


@pytest.mark.parametrize("scheme", [None, "int8", "fp8"])
def test_random_weights_are_of_one_size(scheme):
    model = Model(spec_of(find_source("tiny")), dtype=torch.float32, device="cpu", scheme=find_scheme(scheme))
    _fill(model)
    assert model.projections()
    for part in model.projections().values():
        values = part.weight.detach().float()
        if part.scale is not None:
            values = values * part.scale[..., None]
        assert 0.018 < values.std().item() < 0.022


@pytest.mark.gpu
def test_layers_of_an_encoder_choose_for_the_tokens_of_a_text():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    finalists = {}
    for found in products_of("bert-large"):
        ways = [way for way in candidates_of(found, 128) if way.tiles.block_m][:2]
        if ways:
            finalists[ways[0].shape] = [row_of(way.shape, way.tiles) for way in ways]
    chosen = list(settled("bert-large", 128, finalists))
    assert {(shape.n, shape.k) for shape, _, _ in chosen} == {(found.n, found.k) for found in BERT}
    assert all(row in finalists[shape] and saved < 1 for shape, row, saved in chosen)


@pytest.mark.gpu
@pytest.mark.parametrize(("scheme", "rows"), [("int8", 1), ("int8", 128), ("fp8", 1)])
def test_weights_in_8_bits_are_tuned(scheme, rows):
    """A small model's products: some ways alone, then its layers with two of each."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if scheme == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that knows fp8")
    bench, finalists = Bench(scheme), {}
    for found in products_of("qwen-0.5b", scheme):
        ways = list(candidates_of(found, rows))
        rows_of_table = bench.finalists(ways[:: max(1, len(ways) // 5)])
        assert (rows_of_table[0]["itemsize"], rows_of_table[0]["fp8"]) == (1, scheme == "fp8")
        assert rows_of_table[0]["us"] > 0
        finalists[ways[0].shape] = [row_of(way.shape, way.tiles) for way in ways[:2]]
    chosen = list(settled("qwen-0.5b", rows, finalists, scheme))
    assert {shape for shape, _, _ in chosen} == finalists.keys()
    assert all(row in finalists[shape] and saved < 1 for shape, row, saved in chosen)


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
