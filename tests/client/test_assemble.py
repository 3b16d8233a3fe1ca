"""What a reader gets: deltas as tokens come, text cut at stop strings, log probabilities, and one completion."""

from array import array

import pytest

from headrace.client.assemble import Assembler
from headrace.client.events import Ended, Failed, NewTokens
from headrace.client.prepare import Wish, prepare
from headrace.client.types import Delta, TokenLogprob, TopLogprob, Usage
from headrace.errors import OverloadedError
from tests.client.tiny import tiny_text
from tests.support.tiny_tokenizer import END_OF_TEXT, IM_END

ID = bytes(range(16))


def assembler(**settings):
    return Assembler(prepare(Wish(prompt="Q:", settings=settings), tiny_text(), None))


def tokens(ids, choice=0, logprobs=None):
    return NewTokens(ID, choice, array("I", list(ids)), logprobs)


def ended(choice=0, reason="stop", cached=0):
    return Ended(ID, choice, reason, cached)


def test_text_comes_as_its_tokens_do():
    answer = assembler()
    assert answer.id == ""
    assert answer.feed(tokens(b"He")) == [Delta(0, "He", (72, 101))]
    assert answer.id == ID.hex()
    assert answer.feed(tokens("é".encode()[:1])) == [Delta(0, "", (0xC3,))]
    assert answer.feed(tokens("é".encode()[1:])) == [Delta(0, "é", (0xA9,))]
    assert not answer.done
    assert answer.feed(ended(reason="length", cached=1)) == [Delta(0, "", (), None, "length")]
    assert answer.done
    completion = answer.completion()
    assert completion.text == "Heé"
    assert completion.choices[0].token_ids == (72, 101, 0xC3, 0xA9)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage == Usage(2, 4, 1)
    assert (completion.model, completion.prompt_tokens) == ("tiny", 2)


def test_the_token_that_ends_a_text_is_no_part_of_it():
    answer = assembler(stop_token_ids=[ord("!")])
    answer.feed(tokens([*b"a", END_OF_TEXT]))
    answer.feed(ended())
    assert answer.completion().text == "a"
    answer = assembler(stop_token_ids=[ord("!")])
    answer.feed(tokens(b"a!"))
    answer.feed(ended())
    assert answer.completion().text == "a"
    assert answer.completion().choices[0].token_ids == (97, 33)


def test_whoever_ignores_the_end_token_still_does_not_see_it():
    answer = assembler(ignore_eos=True)
    answer.feed(tokens([97, IM_END, 98]))
    assert answer.feed(ended(reason="length"))[-1].finish_reason == "length"
    assert answer.completion().text == "ab"


def test_half_a_character_at_the_end_is_shown_as_such():
    answer = assembler()
    answer.feed(tokens("日".encode()[:2]))
    assert answer.feed(ended(reason="length")) == [Delta(0, "\N{REPLACEMENT CHARACTER}", (), None, "length")]


def test_a_stop_string_across_tokens():
    answer = assembler(stop=["END", "\n\n"])
    assert answer.feed(tokens(b"one E")) == [Delta(0, "one ", tuple(b"one E"))]
    assert answer.feed(tokens(b"N")) == [Delta(0, "", (78,))]
    # The rest of the run is not even looked at: the engine was ahead of the text.
    assert answer.feed(tokens(b"D and more")) == [Delta(0, "", (68,), None, "stop")]
    assert answer.done
    assert answer.feed(tokens(b"late")) == answer.feed(ended(reason="length")) == []
    completion = answer.completion()
    assert (completion.text, completion.choices[0].finish_reason) == ("one ", "stop")
    assert completion.choices[0].token_ids == tuple(b"one END")


def test_what_was_no_stop_string_comes_in_the_end():
    answer = assembler(stop=["END"])
    assert answer.feed(tokens(b"the EN"))[0].text == "the "
    assert answer.feed(ended(reason="length")) == [Delta(0, "EN", (), None, "length")]
    assert answer.completion().text == "the EN"


def test_a_stop_string_that_only_the_last_half_character_completes():
    answer = assembler(stop=["\N{REPLACEMENT CHARACTER}"])
    answer.feed(tokens([97, 0xE6]))
    assert answer.feed(ended(reason="length")) == [Delta(0, "", (), None, "stop")]


def test_choices_are_kept_apart():
    answer = assembler(n=3, stop=["x"])
    answer.feed(tokens(b"ab", 1))
    answer.feed(tokens(b"cx", 0))
    assert not answer.done
    answer.feed(tokens(b"c", 1))
    answer.feed(ended(1, "length", cached=2))
    answer.feed(tokens(b"d", 2))
    assert not answer.done
    answer.feed(ended(2, "stop", cached=1))
    assert answer.done
    choices = answer.completion().choices
    assert [(c.index, c.text, c.finish_reason) for c in choices] == [
        (0, "c", "stop"),
        (1, "abc", "length"),
        (2, "d", "stop"),
    ]
    assert answer.completion().usage == Usage(2, 6, 2)


def test_log_probabilities_go_with_their_tokens():
    answer = assembler(logprobs=2, stop=["c"])
    wire = [[-0.5, [[97, -0.5], [0xE6, -1]]], [-2, []], [-3.0, []]]
    (delta,) = answer.feed(tokens(b"abc", logprobs=wire[:3]))
    top = (TopLogprob("a", 97, b"a", -0.5), TopLogprob("\N{REPLACEMENT CHARACTER}", 0xE6, b"\xe6", -1.0))
    wanted = (
        TokenLogprob("a", 97, b"a", -0.5, top),
        TokenLogprob("b", 98, b"b", -2.0),
        TokenLogprob("c", 99, b"c", -3.0),
    )
    assert delta == Delta(0, "ab", (97, 98, 99), wanted, "stop")
    assert answer.completion().choices[0].logprobs == wanted


def test_nobody_asked_for_log_probabilities():
    answer = assembler()
    assert answer.feed(tokens(b"a"))[0].logprobs is None
    answer.feed(ended())
    assert answer.completion().choices[0].logprobs is None


def test_an_error_ends_all_of_it():
    answer = assembler(n=2)
    answer.feed(tokens(b"ab", 1))
    error = OverloadedError("full")
    assert answer.feed(Failed(error)) == []
    assert answer.done
    assert answer.error is error
    with pytest.raises(OverloadedError):
        answer.completion()


def test_a_reader_that_stops_keeps_what_it_has():
    answer = assembler(n=2, stop=["END"])
    answer.feed(tokens(b"the E", 0))
    answer.feed(ended(1, "length"))
    assert answer.abandon() == [Delta(0, "E", (), None, "cancelled")]
    assert answer.abandon() == []
    assert [(c.text, c.finish_reason) for c in answer.completion().choices] == [("the E", "cancelled"), ("", "length")]
