"""Nothing that is secret passes, however its text is cut."""

from __future__ import annotations

import httpx
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.engines.remote.secrets import Secrets, without_secrets


def test_secrets_are_the_key_and_what_a_url_holds_besides_its_address() -> None:
    url = httpx.URL("https://bob1:p%40ss@host:9/v1?token=abcd&v=1#part")
    assert set(Secrets.of(url, "the-key").values) == {"bob1", "p%40ss", "p@ss", "abcd", "the-key"}
    assert without_secrets(url) == "https://host:9/v1"


@given(st.lists(st.text("aby", max_size=6), max_size=8))
def test_a_stream_says_what_the_whole_text_would(pieces: list[str]) -> None:
    secrets = Secrets(["abba", "yyyy"])
    stream = secrets.stream()
    shown = "".join([stream.add(piece) for piece in pieces]) + stream.flush()
    assert not any(value in shown for value in secrets.values)
    if secrets.blank("".join(pieces)) == "".join(pieces):
        assert shown == "".join(pieces)
