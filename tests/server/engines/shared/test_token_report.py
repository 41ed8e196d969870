from __future__ import annotations

from ensemble_server.server.engines.shared.token_report import report
from ensemble_server.server.weights.view import Surface


def test_a_token_is_reported_with_its_bytes_and_alternatives_in_their_order(surface: Surface) -> None:
    first, other = surface.encode(" fox")[0], surface.encode("!")[0]
    token = report(surface, first, -0.5, [(other, -0.25), (first, -0.5)])
    assert (token.token_id, token.logprob, token.bytes) == (first, -0.5, surface.bytes_of(first))
    assert [(top.token_id, top.logprob, top.top) for top in token.top] == [(other, -0.25, ()), (first, -0.5, ())]


def test_a_part_of_a_character_has_exact_bytes_and_readable_text(surface: Surface) -> None:
    part = surface.encode("😀")[0]
    token = report(surface, part, None)
    assert (token.bytes, token.text, token.logprob) == (surface.bytes_of(part), "\ufffd", None)
