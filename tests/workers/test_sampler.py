"""The sampling op against a plain restatement of its rules, its statistics, and the settings kept by row."""

from __future__ import annotations

import math
from array import array

import pytest
import torch

from headrace.kernels.ops import sampling as op
from headrace.messages import StreamId
from headrace.sampling import SamplingParams
from headrace.workers.sampler import Sampler
from headrace.workers.sequence import Sequence
from tests.support.logit_edits import Bias, Penalties, edit_logits

# Below and above one block of 64, not a multiple of it, and large enough for each of the short cuts.
VOCABS = [1, 2, 5, 64, 1000, 4096, 40_003]


def make_rows(count: int, **values) -> op.SamplingRows:
    """`count` rows with the same or, given as lists, different settings."""

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        value = values.get(name, default)
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=dtype)

    temperature, top_k = column("temperature", 1.0, torch.float32), column("top_k", 0, torch.int64)
    top_p = column("top_p", 1.0, torch.float32)
    return op.SamplingRows(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=column("min_p", 0.0, torch.float32),
        seeds=column("seeds", 7, torch.int64),
        choices=column("choices", 0, torch.int64),
        positions=column("positions", 0, torch.int64),
    )


def plain_draw(logits: torch.Tensor, rows: op.SamplingRows, row: int) -> int:
    """The rules of the op's docstring, with sorting and in float64, without any short cut."""
    z = (logits[row].double() - logits[row].double().max()) / rows.temperature[row].double()
    kept = torch.ones_like(z, dtype=torch.bool)
    if 0 < (k := int(rows.top_k[row])) < len(z):
        kept &= z >= z.sort(descending=True).values[k - 1]
    if (p := float(rows.top_p[row])) < 1:
        order = z.masked_fill(~kept, -math.inf).sort(descending=True).values
        reached = order.softmax(-1).cumsum(-1) < p
        kept &= z >= order[min(int(reached.sum()), len(z) - 1)]
    kept &= z >= math.log(float(rows.min_p[row])) if rows.min_p[row] > 0 else True
    ids = torch.arange(len(z))
    noise = op.gumbel_noise(rows.seeds[row][None], rows.choices[row][None], rows.positions[row][None], ids[None])[0]
    return int((z.float() + noise).masked_fill(~kept, -math.inf).argmax())


def words(*numbers: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([number]) for number in numbers)


# --------------------------------------------------------------------------------------------------------- the noise


# Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert tuple(int(word) for word in op.philox(words(*counter), words(*key))) == answer


def test_noise_follows_the_documented_counter_layout():
    seed, choice, position, token = 2**63 + 12345, 3, 77, 1002
    counter, key = words(token >> 2, position, choice, 0), words(seed & 0xFFFFFFFF, seed >> 32)
    word = float(op.philox(counter, key)[token & 3])
    expected = -math.log(-math.log1p(-(word + 0.5) * 2.0**-32))
    (signed,) = words(seed - 2**64)
    noise = op.gumbel_noise(signed, *words(choice, position), torch.tensor([[token]]))
    assert float(noise) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("vocab", [1, 3, 4, 1001])
def test_noise_of_all_tokens_is_the_noise_of_each(vocab: int):
    stream = (torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([5, 6]))
    sparse = op.gumbel_noise(*stream, torch.arange(vocab).expand(2, -1))
    assert torch.equal(op.dense_noise(*stream, vocab), sparse)


def test_noise_is_bounded_and_finite_for_every_word():
    noise = op.noise_of(torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]))
    assert noise.isfinite().all()
    assert float(noise.max()) <= op.MAX_NOISE
    assert float(noise[0]) > 22.8


# -------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_takes_the_first_of_the_largest(vocab: int, dtype: torch.dtype):
    logits = torch.randn(9, vocab).mul(2).round().to(dtype)  # full of ties
    tokens = op.choose(logits)
    assert tokens.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits.float()]


# Flat, realistic and peaked rows; with and without ties; every filter alone and together.
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
        {"top_k": 500},
        {"top_k": 3000, "top_p": 0.99},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
    ],
)
def test_draws_are_those_of_the_plain_rules(vocab: int, scale: float, ties: bool, filters: dict):
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    if ties:
        logits = logits.mul(2).round().div(2)
    rows = make_rows(4, seeds=[1, 2, 2**62, -1], positions=[0, 1, 2, 2**20], **filters)
    tokens = op.choose(logits, rows).tolist()
    assert tokens == [plain_draw(logits, rows, row) for row in range(4)]


def test_draws_follow_softmax():
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])
    count = 50_000
    logits = probabilities.log().expand(count, -1)
    rows = make_rows(count, positions=list(range(count)))
    found = op.choose(logits, rows).bincount(minlength=7)
    chi_square = float(((found - count * probabilities) ** 2 / (count * probabilities)).sum())
    assert chi_square < 22.5  # 6 degrees of freedom: 0.1% of seeds would fail


def test_draws_at_a_temperature_follow_the_sharpened_softmax():
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0])
    count = 20_000
    expected = count * (logits / 0.5).softmax(-1)
    rows = make_rows(count, temperature=0.5, seeds=list(range(count)))
    found = op.choose(logits.expand(count, -1), rows).bincount(minlength=4)
    assert float(((found - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom, 0.1%


def test_choices_seeds_and_positions_draw_independently():
    logits = torch.zeros(1, 1000).expand(64, -1)
    for name in ("seeds", "choices", "positions"):
        tokens = op.choose(logits, make_rows(64, **{name: list(range(64))}))
        assert len(tokens.unique()) > 50, name


def test_neighbours_in_the_batch_change_nothing():
    logits = torch.randn(6, 5000)
    settings = {
        "temperature": [0.0, 1.0, 0.7, 1.0, 2.0, 0.5],
        "top_k": [0, 0, 20, 2000, 0, 0],
        "top_p": [1.0, 1.0, 0.8, 1.0, 0.95, 1.0],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.2],
        "seeds": [0, 1, 2, 3, 4, 5],
    }
    together = op.choose(logits, make_rows(6, **settings)).tolist()
    alone = [
        int(op.choose(logits[[row]], make_rows(1, **{name: [column[row]] for name, column in settings.items()})))
        for row in range(6)
    ]
    assert together == alone


def test_tiny_temperatures_do_not_overflow():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert op.choose(logits, make_rows(1, temperature=1e-38)).tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("vocab", [5, 4096])
def test_a_row_that_holds_no_numbers_fails_alone(bad: float, vocab: int):
    logits = torch.randn(3, vocab)
    expected = op.choose(logits, make_rows(3))
    logits[1, vocab // 2] = bad
    for rows in (None, make_rows(3)):
        assert int(op.choose(logits, rows)[1]) == -1
    assert op.choose(logits, make_rows(3))[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_a_row_with_nothing_left_to_choose_fails():
    assert op.choose(torch.full((1, 8), -math.inf), make_rows(1)).tolist() == [-1]


def test_bias_and_penalties_are_applied_in_order():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]])
    bias = Bias(rows=torch.tensor([0, 0]), tokens=torch.tensor([0, 3]), values=torch.tensor([1.0, -math.inf]))
    penalties = Penalties(
        rows=torch.tensor([0, 0, 1]),
        tokens=torch.tensor([0, 1, 2]),
        counts=torch.tensor([2.0, 0.0, 1.0]),
        repetition=torch.tensor([2.0, 1.0]),
        presence=torch.tensor([0.5, 0.25]),
        frequency=torch.tensor([0.1, 0.5]),
    )
    untouched = logits.clone()
    edited = edit_logits(logits, bias, penalties)
    # (2 + 1) / 2 - 0.5 - 2 * 0.1; -2 * 2, not generated yet; 1 - 0.5 - 0.25
    expected = torch.tensor([[0.8, -4.0, 1.0, -math.inf], [2.0, -2.0, 0.25, 0.0]])
    torch.testing.assert_close(edited, expected)
    assert torch.equal(logits, untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 1000, 20_001])
def test_logprobs_are_those_of_the_raw_logits(vocab: int, dtype: torch.dtype):
    logits = torch.randn(3, vocab).mul(3).to(dtype)
    expected = logits.float().log_softmax(-1)
    tokens = logits.argmax(-1)
    found = op.logprobs_of(logits, tokens, min(5, vocab))
    for row, token in enumerate(tokens.tolist()):
        assert float(found.chosen[row]) == pytest.approx(float(expected[row, token]), abs=1e-5)
        values, ids = found.top[row], found.top_tokens[row]
        assert len(values) == min(5, vocab)
        torch.testing.assert_close(values, expected[row].sort(descending=True).values[: len(values)])
        torch.testing.assert_close(values, expected[row][ids])


def test_equal_logprobs_are_ordered_by_id():
    found = op.logprobs_of(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), torch.tensor([1]), 4)
    assert found.top_tokens.tolist() == [[1, 2, 4, 0]]


# ------------------------------------------------------------------------------------------------- settings by row


def make_sequence(
    row: int, output: list[int] = (), stop_ids: tuple[int, ...] = (), prompt: list[int] = (1, 2, 2), **sampling
):
    sequence = Sequence(
        StreamId(bytes([row]), 0, 0),
        array("I", prompt),
        SamplingParams(**sampling),
        max_tokens=100,
        output=array("I", output),
        stop_ids=stop_ids,
        seed=sampling.get("seed", 5),
    )
    sequence.row = row
    return sequence


def choose(sampler: Sampler, logits: list[list[float]], *sequences: Sequence) -> list[int | None]:
    return [choice.token for choice in sampler.choose(torch.tensor(logits), sequences).read()]


def test_end_tokens_are_held_back_until_min_tokens():
    sampler = Sampler(num_rows=2, vocab=4)
    sequence = make_sequence(1, stop_ids=(0, 3), temperature=0.0, min_tokens=2)
    tokens = []
    for _ in range(3):
        tokens += choose(sampler, [[9.0, 1.0, 2.0, 8.0]], sequence)
        reason = sequence.append(tokens[-1])
    assert tokens == [2, 2, 0]
    assert reason == "stop"


def test_logit_bias_can_force_a_token_but_not_an_end_before_min_tokens():
    sampler = Sampler(num_rows=1, vocab=4)
    sequence = make_sequence(0, stop_ids=(2,), temperature=0.0, min_tokens=1, logit_bias={2: 100.0, 1: 50.0})
    assert choose(sampler, [[0.0, 0.0, 0.0]], sequence) == [1]


def test_tokens_that_were_chosen_stay_but_those_of_edited_logits():
    sampler = Sampler(num_rows=3, vocab=4)
    plain, biased, drawn = (
        make_sequence(row=row, prompt=[0], **sampling)
        for row, sampling in enumerate(({"temperature": 0.0}, {"logit_bias": {2: 50.0}}, {"temperature": 1.0}))
    )
    noted = torch.tensor([3, 3, 3])
    sampler.last_tokens[:3] = noted
    choices = sampler.choose(torch.zeros(3, 4), [drawn, biased, plain], noted).read()
    assert [(choice.sequence, choice.token) for choice in choices] == [(drawn, 3), (biased, 2), (plain, 3)]
    assert sampler.last_tokens.tolist() == [3, 2, 3, 0]
    assert noted.tolist() == [3, 3, 3]


def test_penalties_count_prompt_and_output_as_the_rules_say():
    sampler = Sampler(num_rows=3, vocab=4)
    logits = [[0.0, 3.0, 2.9, 2.8]]
    assert choose(sampler, logits, make_sequence(0, temperature=0.0, presence_penalty=2.0)) == [1]
    assert choose(sampler, logits, make_sequence(0, temperature=0.0, repetition_penalty=1.5)) == [3]
    sequence = make_sequence(0, temperature=0.0, frequency_penalty=0.5)
    tokens = []
    for _ in range(4):
        tokens += choose(sampler, logits, sequence)
        sequence.append(tokens[-1])
    assert tokens == [1, 2, 3, 1]


def test_output_of_an_earlier_attempt_counts_for_penalties_and_min_tokens():
    sampler = Sampler(num_rows=2, vocab=4)
    settings = {"temperature": 0.0, "frequency_penalty": 0.5, "min_tokens": 3, "stop_ids": (1,)}
    whole = make_sequence(0, **settings)
    tokens = []
    for _ in range(6):
        tokens += choose(sampler, [[0.0, 9.0, 2.9, 2.8]], whole)
        if whole.append(tokens[-1]):
            break
    assert tokens[-1] == 1
    for cut in range(len(tokens)):
        resumed = make_sequence(1, output=tokens[:cut], **settings)
        assert choose(sampler, [[0.0, 9.0, 2.9, 2.8]], resumed) == tokens[cut : cut + 1], cut


def test_a_row_forgets_its_former_sequence():
    sampler = Sampler(num_rows=1, vocab=4)
    assert choose(sampler, [[1.0, 2.0]], make_sequence(0, temperature=0.0, logit_bias={0: 9.0})) == [0]
    assert choose(sampler, [[1.0, 2.0]], make_sequence(0, temperature=0.0)) == [1]


def test_each_row_gets_as_many_logprobs_as_it_asked_for():
    sampler = Sampler(num_rows=4, vocab=4)
    sequences = [make_sequence(row, temperature=0.0, logprobs=count) for row, count in enumerate([None, 0, 2, 3])]
    choices = sampler.choose(torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 4), sequences).read()
    found = [None if choice.logprobs is None else len(choice.logprobs[1]) for choice in choices]
    assert found == [None, 0, 2, 3]
    logprob, top = choices[2].logprobs
    assert top[0] == [3, logprob]
    assert top[1] == [2, pytest.approx(logprob - 1.0)]


def test_no_token_comes_from_a_row_that_holds_no_numbers():
    sampler = Sampler(num_rows=2, vocab=4)
    sequences = [make_sequence(0, temperature=0.0), make_sequence(1, logprobs=1)]
    assert choose(sampler, [[math.nan, 1.0], [math.nan, 1.0]], *sequences) == [None, None]
