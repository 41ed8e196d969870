"""Nothing that is secret passes, however its text is cut."""

from __future__ import annotations

import base64

import httpx
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.base import TokenLogprob
from ensemble_server.server.engines.remote.secrets import Secrets, without_secrets


def test_secrets_are_the_key_and_what_a_url_holds_besides_its_address() -> None:
    url = httpx.URL("https://bob1:p%40ss@host:9/v1?token=abcd&v=1#part")
    as_header = base64.b64encode(b"bob1:p@ss").decode()
    assert set(Secrets.of(url, "the/key").values) == {
        "bob1",
        "p%40ss",
        "p@ss",
        "abcd",
        "the/key",
        "the%2Fkey",
        as_header,
    }
    assert without_secrets(url) == "https://host:9/v1"


@given(st.lists(st.text("aby", max_size=6), max_size=8))
def test_a_stream_says_what_the_whole_text_would(pieces: list[str]) -> None:
    secrets = Secrets(["abba", "yyyy"])
    stream = secrets.stream()
    shown = "".join([stream.add(piece) for piece in pieces]) + stream.flush()
    assert not any(value in shown for value in secrets.values)
    if secrets.blank("".join(pieces)) == "".join(pieces):
        assert shown == "".join(pieces)


def test_texts_may_say_words_that_are_somebodys_name_and_versions() -> None:
    secrets = Secrets.of(httpx.URL("https://admin:hunter22@host/v1?api-version=2024-06-01"), None)
    said = "The admin wrote on 2024-06-01: hunter22."
    stream = secrets.stream()
    assert stream.add(said) + stream.flush() == "The admin wrote on 2024-06-01: ***."
    assert "admin" not in secrets.blank(said), "an error may well be about the address"
    alone = Secrets.of(httpx.URL("https://token@host/v1"), None).stream()
    assert alone.add("a token") + alone.flush() == "a ***"


@given(st.lists(st.text("aby", min_size=1, max_size=6), max_size=8), st.integers(0, 8))
def test_tokens_say_what_their_text_does_however_they_come(pieces: list[str], cut: int) -> None:
    secrets = Secrets(["abba", "yyyy"])
    other = TokenLogprob(-1, "xabbax", b"xabbax", -2.0)
    tokens = [TokenLogprob(-1, piece, piece.encode(), -1.0, (other,)) for piece in pieces]
    blanked = secrets.tokens()
    shown = [*blanked.add(tokens[:cut]), *blanked.add(tokens[cut:]), *blanked.flush()]
    assert len(shown) == len(tokens)
    assert not any(value in "".join(token.text for token in shown) for value in secrets.values)
    assert all("abba" not in alternative.text for token in shown for alternative in token.top)
    if secrets.blank("".join(pieces)) == "".join(pieces):
        assert [(token.text, token.bytes) for token in shown] == [(token.text, token.bytes) for token in tokens]
