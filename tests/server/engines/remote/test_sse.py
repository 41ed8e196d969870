from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.engines.remote import sse
from ensemble_server.server.engines.remote.sse import EventDecoder

# Texts that data lines can carry: anything but the two characters that end a line.
data_lines = st.lists(
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), min_size=1, max_size=3
)
line_ends = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A stream with comments and fields that do not matter, and the data that it carries."""
    end = draw(line_ends)
    text = draw(st.sampled_from(["", "\ufeff"]))
    events = draw(st.lists(data_lines, max_size=4))
    for lines in events:
        text += draw(st.sampled_from(["", f": keep-alive{end}", f"event: x{end}", f"id{end}", f": ping{end}{end}"]))
        text += "".join(f"data:{draw(st.sampled_from(['', ' ']))}{_unpadded(line)}{end}" for line in lines) + end
    return text.encode(), ["\n".join(map(_unpadded, lines)) for lines in events]


def _unpadded(line: str) -> str:
    return line.lstrip(" ")  # the format takes one leading space away, and a drawn line may begin with several


@given(streams(), st.lists(st.integers(0, 400), max_size=12))
def test_any_cut_of_the_stream_gives_the_same_events(stream: tuple[bytes, list[str]], cuts: list[int]) -> None:
    raw, events = stream
    borders = sorted({0, len(raw), *(min(cut, len(raw)) for cut in cuts)})
    decoder = EventDecoder()
    read = [event for start, end in pairwise(borders) for event in decoder.feed(raw[start:end])]
    if raw.endswith(b"\r"):  # a lone "\r" at the very end could still become "\r\n"
        read += decoder.feed(b":\n")
    assert read == events


@given(st.binary(max_size=300))
def test_no_bytes_whatever_raise_anything_but_a_decoding_error(raw: bytes) -> None:
    with suppress(UnicodeDecodeError):
        EventDecoder().feed(raw)


def test_line_separators_inside_json_do_not_end_a_line() -> None:
    assert EventDecoder().feed('data: "a\u2028b\x85c\x0bd"\n\n'.encode()) == ['"a\u2028b\x85c\x0bd"']


def test_an_event_that_breaks_off_is_not_returned() -> None:
    assert EventDecoder().feed(b"data: whole\n\ndata: half\n") == ["whole"]


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 10)
    decoder = EventDecoder()
    decoder.feed(b"data: 12345\n")
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        decoder.feed(b"data: 67890\n")
