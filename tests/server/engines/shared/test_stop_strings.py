"""Stop strings, against a search that looks at the whole text after every character."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.engines.shared.stop_strings import MAX_STOP_CHARS, StopStrings, check_stops


def cut(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """`text` as it stands when the first stop string is complete, character by character."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


letters = st.text("abc", max_size=12)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3, unique=True)


@given(st.lists(letters, max_size=6), stop_lists, st.booleans())
@example(["xabcdx"], ["abcd", "bc"], False)
@example(["xabc", "dx"], ["abcd", "bc"], False)
@example(["aab"], ["aab", "ab"], True)
def test_however_text_is_cut_into_pieces_it_ends_at_the_first_stop(
    parts: list[str], stops: list[str], include: bool
) -> None:
    stream = StopStrings(stops, include=include)
    shown, met = "", None
    for part in parts:
        text, met = stream.add(part)
        shown += text
        if met is not None:
            break
    else:
        shown += stream.flush()
    assert (shown, met) == cut("".join(parts), stops, include=include)


def test_text_is_held_back_only_while_it_may_become_a_stop() -> None:
    stream = StopStrings(["\n\nUser:"], include=False)
    assert stream.add("Hi\n") == ("Hi", None)
    assert stream.add("\nUs") == ("", None)
    assert stream.add("a") == ("\n\nUsa", None)
    assert stream.add("\n") == ("", None)
    assert stream.flush() == "\n"


def test_without_stops_nothing_is_held_back() -> None:
    stream = StopStrings([], include=False)
    assert stream.add("anything") == ("anything", None)
    assert stream.flush() == ""


def test_text_that_almost_repeats_a_long_string_is_searched_once() -> None:
    """Each character is compared a bounded number of times, whatever the strings: the worst case of a plain search."""
    comparisons = 0

    class Counted(str):
        def __getitem__(self, key: object) -> str:
            nonlocal comparisons
            comparisons += 1
            return super().__getitem__(key)  # type: ignore[index]

    stop = Counted("a" * (MAX_STOP_CHARS - 1) + "b")
    stream, num_chars = StopStrings([stop], include=False), 20 * MAX_STOP_CHARS
    shown = sum(len(stream.add("aaaa")[0]) for _ in range(num_chars // 4))
    assert shown + len(stream.flush()) == num_chars
    assert comparisons < 8 * num_chars


def test_what_is_held_back_is_no_longer_than_a_stop_string() -> None:
    stream = StopStrings(["ab" * 50], include=False)
    shown = "".join(stream.add("ab")[0] for _ in range(49))
    assert shown == ""
    assert stream.add("a")[0] == "" and stream.add("a")[0] == "ab" * 49 + "a"


def test_a_string_that_is_too_long_is_refused_by_name() -> None:
    check_stops(["x" * MAX_STOP_CHARS])
    with pytest.raises(RequestError, match="at most 1000 characters, got 1001") as refused:
        check_stops(["ok", "x" * (MAX_STOP_CHARS + 1)])
    assert refused.value.param == "stop"
