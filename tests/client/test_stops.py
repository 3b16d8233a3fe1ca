"""Stop strings cut where the leftmost one begins, however the text comes in pieces, and no part of one leaks."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.client.stops import StopFinder

# Few letters, so that stop strings overlap themselves, each other and the text in every way.
WORDS = st.text("ab\n", min_size=1, max_size=5)
STOPS = st.lists(WORDS, max_size=4).map(tuple)


def cut(text, stops):
    """The definition."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


@settings(deadline=None, max_examples=1000)
@given(parts=st.lists(st.text("ab\n", max_size=6), max_size=12), stops=STOPS)
@example(parts=["aab"], stops=("aabb", "ab"))
@example(parts=["aab", "b"], stops=("aabb", "ab"))
@example(parts=["ab", "ab", "aba"], stops=("ababab", "b\n"))
def test_any_pieces_are_cut_at_the_same_place(parts, stops):
    finder = StopFinder(stops)
    text = "".join(parts)
    wanted = cut(text, stops)
    out = ""
    for part in parts:
        out += finder.feed(part)
        assert wanted.startswith(out)
    out += finder.feed("", final=True)
    assert out == wanted
    assert (finder.hit is not None) == (wanted != text or any(stop in text for stop in stops))
    if finder.hit is not None:
        assert text[len(wanted) :].startswith(finder.hit)


@settings(deadline=None, max_examples=500)
@given(parts=st.lists(st.text("ab\n", max_size=6), max_size=12), rest=st.text("ab\n", max_size=6), stops=STOPS)
def test_nothing_leaks_that_could_be_part_of_a_stop_string(parts, rest, stops):
    """Whatever comes next, text already given out never belongs to a stop string."""
    finder = StopFinder(stops)
    out = "".join(finder.feed(part) for part in parts)
    assert cut("".join(parts) + rest, stops).startswith(out)


@settings(deadline=None, max_examples=500)
@given(parts=st.lists(st.text("ab\n", max_size=6), max_size=12), stops=STOPS)
def test_no_more_is_held_back_than_must_be(parts, stops):
    finder = StopFinder(stops)
    text = "".join(parts)
    out = "".join(finder.feed(part) for part in parts)
    if cut(text, stops) == text and not any(stop in text for stop in stops):
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_after_a_hit_there_is_nothing_more():
    finder = StopFinder(["END"])
    assert finder.feed("so it END of it") == "so it "
    assert finder.feed("and on") == finder.feed("", final=True) == ""
    assert finder.hit == "END"


def test_long_stop_strings():
    stop = "-" * 1000 + "!"
    finder = StopFinder([stop])
    out = "".join(finder.feed("-") for _ in range(1500))
    assert out == "-" * 500
    assert finder.feed("!") == ""
    assert finder.hit == stop
