"""PagedCache: rows that share blocks, are reordered, repeated and cropped, with and without sources, against one that
keeps every row apart."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.kv import KVCache
from headrace.kernels.spec import AttentionSpec, EmbeddingSpec, HeadSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec
from headrace.workers.inference.cache import BLOCK_SIZE, PagedCache

NORM = NormSpec(kind="rms", eps=1e-6)
LAYER = LayerSpec(
    placement="pre",
    norm=NORM,
    attention=AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=1, scale=1.0),
    mlp=MLPSpec(size=1, activation="relu"),
)
SPEC = ModelSpec(
    vocab_size=1,
    hidden_size=1,
    layers=(LAYER, LAYER),
    embedding=EmbeddingSpec(size=1),
    final_norm=NORM,
    head=HeadSpec(tied=True),
    max_positions=1000,
)


class Rows:
    """A cache, and beside it what each row should hold; every token written is another number."""

    def __init__(self, expected_tokens=None):
        self.cache = PagedCache(SPEC, dtype=torch.float64, device=torch.device("cpu"), expected_tokens=expected_tokens)
        self.rows: list[list[float]] = []
        self.columns: list[list[bool]] = []
        self.sources: list[list[float]] = []
        self.next = 1.0
        self.shown = []

    def add_sources(self, mask):
        kv = self.cache.add_sources(torch.tensor(mask, dtype=torch.bool))
        self.rows, self.columns = [[] for _ in mask], [[] for _ in mask]
        self.sources = [[] for _ in mask]
        for row, columns in enumerate(mask):
            for _ in range(sum(columns)):
                self.write(kv, self.cache.source_tables[row], self.sources[row])
        self.check()

    def write(self, kv, table, numbers):
        slot = table[len(numbers) // BLOCK_SIZE] * BLOCK_SIZE + len(numbers) % BLOCK_SIZE
        for layer in range(2):
            keys, values = kv.layer(layer)
            keys[slot], values[slot] = self.next + layer / 4, -self.next - layer / 4
        numbers.append(self.next)
        self.next += 1

    def extend(self, mask):
        self.rows = self.rows or [[] for _ in mask]
        self.columns = self.columns or [[] for _ in mask]
        kv = self.cache.extend(torch.tensor(mask, dtype=torch.bool))
        for row, new in enumerate(mask):
            for real in new:
                self.columns[row].append(real)
                if real:
                    self.write(kv, self.cache.tables[row], self.rows[row])
        self.check()

    def select(self, indices):
        self.cache.batch_select_indices(torch.tensor(indices))
        self.rows = [list(self.rows[index]) for index in indices]
        self.columns = [list(self.columns[index]) for index in indices]
        self.sources = [list(self.sources[index]) for index in indices] if self.sources else []
        self.check()

    def crop(self, count):
        self.cache.crop(-count)
        kept = max(0, len(self.columns[0]) - count) if self.columns else 0
        self.columns = [columns[:kept] for columns in self.columns]
        self.rows = [row[: sum(columns)] for row, columns in zip(self.rows, self.columns, strict=True)]
        self.check()

    def move(self, home):
        self.cache.move(home)
        assert self.cache.home is home
        self.check()

    def check(self):
        self.cache.validate()
        # Who shows a list to a device goes on from where it ended.
        assert all(table[: len(before)] == before for table, before in self.shown)
        self.shown = [(table, [*table]) for table in (*self.cache.tables, *self.cache.source_tables)]
        assert self.cache.get_seq_length() == (len(self.columns[0]) if self.columns else 0)
        assert self.cache.source_lens == [len(source) for source in self.sources]
        for numbers, tables in ((self.rows, self.cache.tables), (self.sources, self.cache.source_tables)):
            for expected, table in zip(numbers, tables, strict=True):
                slots = [
                    table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                    for position in range(len(expected))
                ]
                for layer in range(2):
                    if expected:
                        keys, values = self.cache.kv.layer(layer)
                        assert (keys[slots, 0, 0] - layer / 4).tolist() == expected
                        assert (-values[slots, 0, 0] - layer / 4).tolist() == expected


def texts(*lens):
    """A left-padded mask."""
    longest = max(lens)
    return [[False] * (longest - length) + [True] * length for length in lens]


def test_beams_share_what_they_have_in_common():
    rows = Rows()
    rows.extend(texts(3 * BLOCK_SIZE + 5))
    rows.select([0, 0, 0])
    assert rows.cache.num_held == 4
    rows.extend(texts(1, 1, 1))  # each now has its own last block
    assert rows.cache.num_held == 3 + 3
    rows.select([2, 2, 0])
    assert rows.cache.num_held == 3 + 2
    rows.extend(texts(1, 1, 1))
    assert rows.cache.num_held == 3 + 3


def test_full_blocks_are_never_copied():
    rows = Rows()
    rows.extend(texts(2 * BLOCK_SIZE))
    rows.select([0, 0])
    rows.extend(texts(1, 1))
    assert rows.cache.num_held == 2 + 2


def test_memory_is_taken_at_once_when_the_length_is_known():
    rows = Rows(expected_tokens=10 * BLOCK_SIZE)
    rows.extend(texts(3, 1))
    tensor = rows.cache.kv
    rows.extend(texts(10 * BLOCK_SIZE - 3, 7))
    assert rows.cache.kv is tensor


@pytest.mark.parametrize("copies", [1, 3])
def test_memory_for_the_expected_length_lasts_to_its_end(copies):
    """It was taken again, and twice as much, in the last block: room for copies was wanted where nothing is shared."""
    rows = Rows(expected_tokens=3 * BLOCK_SIZE)
    rows.extend(texts(*[2 * BLOCK_SIZE - 2] * copies))
    tensor = rows.cache.kv
    for _ in range(BLOCK_SIZE + 2):
        rows.extend(texts(*[1] * copies))
        rows.select([0] * copies)
    assert rows.cache.kv is tensor
    assert rows.cache.lens == [3 * BLOCK_SIZE] * copies


class Place:
    """What a cache needs of a Home."""

    def __init__(self, num_blocks):
        self.kv = KVCache(SPEC, num_blocks, BLOCK_SIZE, torch.float64, torch.device("cpu"))
        self.num_blocks = num_blocks


def test_a_home_is_lived_in_until_it_is_too_small():
    rows, place = Rows(), Place(4)
    rows.move(place)
    assert not rows.cache.is_initialized
    rows.extend(texts(BLOCK_SIZE + 1, 3))
    assert rows.cache.kv is place.kv
    rows.extend(texts(BLOCK_SIZE + 3, 1))
    assert rows.cache.home is place
    rows.extend(texts(1, BLOCK_SIZE))
    assert rows.cache.home is None
    assert rows.cache.kv is not place.kv


def test_what_does_not_fit_never_moves_in():
    rows, place = Rows(), Place(1)
    rows.move(place)
    rows.extend(texts(BLOCK_SIZE + 1))
    assert rows.cache.home is None


def test_a_cache_that_is_reset_has_left_its_home():
    rows, place = Rows(), Place(4)
    rows.move(place)
    rows.extend(texts(3))
    rows.cache.reset()
    assert (rows.cache.home, rows.cache.kv) == (None, None)


def test_a_home_that_is_gone_leaves_its_memory():
    rows, place = Rows(), Place(4)
    rows.move(place)
    rows.extend(texts(5, 2))
    del place
    assert rows.cache.home is None
    rows.extend(texts(BLOCK_SIZE, BLOCK_SIZE))
    rows.extend(texts(BLOCK_SIZE, 1))


def test_a_copy_has_memory_of_its_own():
    rows, place = Rows(), Place(4)
    rows.move(place)
    rows.extend(texts(5, 2))
    other = copy.deepcopy(rows.cache)
    assert (other.home, other.lens, other.tables) == (None, rows.cache.lens, rows.cache.tables)
    rows.extend(texts(1, 1))
    other.validate()
    assert other.lens == [5, 2]
    assert other.kv is not rows.cache.kv


def test_rows_are_repeated_side_by_side():
    rows = Rows()
    rows.extend(texts(5, 2))
    rows.cache.batch_repeat_interleave(2)
    assert rows.cache.lens == [5, 5, 2, 2]
    assert rows.cache.batch_size == 4


def test_rows_are_kept_by_a_mask():
    rows = Rows()
    rows.extend(texts(5, 2, 3))
    rows.cache.batch_select_indices(torch.tensor([True, False, True]))
    assert rows.cache.lens == [5, 3]
    rows.cache.validate()


@pytest.mark.parametrize(("argument", "kept"), [(-4, 6), (0, 10), (-100, 0), (7, 7), (99, 10)])
def test_crop_removes_columns_or_keeps_them(argument, kept):
    """A negative number says how many to remove; in older transformers a positive one said how many to keep."""
    rows = Rows()
    rows.extend(texts(10, 3))
    rows.cache.crop(argument)
    assert rows.cache.get_seq_length() == kept
    assert rows.cache.lens == [kept, max(0, kept - 7)]
    rows.cache.validate()


def test_reset_forgets_everything():
    rows = Rows()
    rows.extend(texts(5, 2))
    rows.cache.reset()
    assert (rows.cache.get_seq_length(), rows.cache.batch_size, rows.cache.num_held) == (0, -1, 0)


def test_what_transformers_asks_for():
    cache = Rows().cache
    assert len(cache) == 2
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False, False]
    assert (cache.is_compileable, cache.is_croppable, cache.get_max_length()) == (False, True, -1)
    assert cache.get_mask_sizes(3) == (3, 0)
    assert repr(cache) == "PagedCache(rows=0, columns=0, blocks=0)"
    with pytest.raises(TypeError, match="the engine that made it"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_copies_of_a_row_share_its_source():
    rows = Rows()
    rows.add_sources(texts(BLOCK_SIZE + 5, 3))
    assert rows.cache.num_held == 2 + 1
    rows.cache.batch_repeat_interleave(3)
    rows.cache.validate()
    assert rows.cache.source_lens == [BLOCK_SIZE + 5] * 3 + [3] * 3
    assert rows.cache.num_held == 2 + 1
    rows.cache.extend(torch.ones(6, 1, dtype=torch.bool))
    assert rows.cache.num_held == 2 + 1 + 6
    rows.cache.batch_select_indices(torch.tensor([0, 1]))
    rows.cache.validate()
    assert rows.cache.num_held == 2 + 2


def test_sources_outlive_the_text():
    rows = Rows(expected_tokens=40)
    rows.add_sources(texts(20, 7))
    tensor = rows.cache.kv
    rows.extend(texts(40, 12))
    assert rows.cache.kv is tensor  # there was memory for sources and texts at once
    rows.crop(40)
    assert rows.cache.lens == [0, 0]
    rows.extend(texts(3, 3))
    rows.cache.reset()
    assert (rows.cache.source_lens, rows.cache.num_held) == ([], 0)
    rows.cache.validate()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_history(data):
    rows = Rows(data.draw(st.sampled_from([None, 1, 40])))
    places = []
    count = data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        columns = data.draw(st.integers(1, 2 * BLOCK_SIZE + 1))
        rows.add_sources([data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns)) for _ in range(count)])
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["extend", "extend", "select", "crop", "move"])) if rows.rows else "extend"
        if action == "extend":
            columns = data.draw(st.integers(1, 2 * BLOCK_SIZE + 1))
            rows.extend([data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns)) for _ in range(count)])
        elif action == "select":
            rows.select(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4)))
            count = len(rows.rows)
        elif action == "move":
            places.append(data.draw(st.sampled_from([None, Place(100)])))
            rows.move(places[-1])
        else:
            rows.crop(data.draw(st.integers(0, 40)))
