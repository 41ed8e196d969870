"""The one rule from tokens to what a client sees, that every engine keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ensemble_server.ensembles.base import Delta, Grammar, Sampling, TokenLogprob
from ensemble_server.server.engines.shared.choice_text import ChoiceText, ends_of_text, joined
from ensemble_server.server.weights.view import Surface

EOS = 2
DIGITS = Grammar("regex", "[0-9]+")


def text_of(surface: Surface, *, max_new_tokens: int = 20, **sampling: Any) -> ChoiceText:
    return ChoiceText(3, Sampling(**sampling), surface, max_new_tokens=max_new_tokens, eos_ids=frozenset({EOS}))


def add_all(choice: ChoiceText, token_ids: Iterable[int]) -> list[Delta]:
    """Up to the end."""
    deltas = []
    for token_id in token_ids:
        deltas.append(choice.add(token_id))
        if choice.finish_reason is not None:
            break
    return deltas


def test_text_is_that_of_the_tokens_and_characters_stay_whole(surface: Surface) -> None:
    ids = surface.encode("fox 😀!")
    choice = text_of(surface)
    deltas = add_all(choice, ids)
    assert "".join(delta.text for delta in deltas) == "fox 😀!"
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids
    assert {delta.index for delta in deltas} == {3}
    assert (choice.num_generated, choice.last_token, choice.finish_reason) == (len(ids), ids[-1], None)


def test_bytes_that_are_known_by_themselves_are_a_piece(surface: Surface) -> None:
    choice = text_of(surface, stop=("!",))
    deltas = [choice.add_piece(7, b"fox "), choice.add_piece(None, "😀".encode()[:2])]
    deltas += [choice.add_piece(8, "😀".encode()[2:]), choice.add_piece(9, b"!?")]
    shown = joined(deltas)
    assert (shown.text, shown.token_ids, shown.stop_reason) == ("fox 😀", (7, 8, 9), "!")
    assert choice.num_generated == 4


def test_an_end_of_text_is_counted_but_not_shown(surface: Surface) -> None:
    choice = text_of(surface, skip_special_tokens=False)
    report = TokenLogprob(EOS, "", b"", -1.0)
    delta = choice.add(EOS, report)
    assert delta == Delta(3, finish_reason="stop")
    assert (choice.num_generated, choice.last_token, choice.finish_reason) == (1, None, "stop")


def test_an_ignored_end_of_text_is_text(surface: Surface) -> None:
    delta = text_of(surface, ignore_eos=True, skip_special_tokens=False).add(EOS)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("<|im_end|>", (EOS,), None)


def test_under_a_grammar_an_end_of_text_ends_it_and_is_not_shown_though_it_is_ignored(surface: Surface) -> None:
    """It is allowed only where the text is complete; shown, it would make text that does not match."""
    choice = text_of(surface, ignore_eos=True, grammar=DIGITS, skip_special_tokens=False)
    shown = joined([*add_all(choice, surface.encode("12")), choice.add(EOS, is_complete=True)])
    assert (shown.text, shown.finish_reason, shown.stop_reason) == ("12", "stop", None)
    assert EOS not in shown.token_ids
    assert ends_of_text(Sampling(ignore_eos=True, grammar=DIGITS), frozenset({EOS})) == {EOS}
    assert ends_of_text(Sampling(ignore_eos=True), frozenset({EOS})) == frozenset()


def test_a_token_after_which_nothing_may_follow_is_shown_and_ends_it(surface: Surface) -> None:
    [token_id] = surface.encode("7")
    delta = text_of(surface, grammar=DIGITS).add(token_id, is_complete=True)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("7", (token_id,), "stop")


def test_stop_tokens_are_named_and_not_shown(surface: Surface) -> None:
    choice = text_of(surface, stop_token_ids=(40,))
    assert choice.add(40) == Delta(3, finish_reason="stop", stop_reason=40)


def test_a_stop_string_cuts_the_text_across_tokens(surface: Surface) -> None:
    choice = text_of(surface, stop=("jumps",))
    deltas = add_all(choice, surface.encode("The fox jumps over the dog"))
    assert "".join(delta.text for delta in deltas) == "The fox "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "jumps")


def test_a_stop_string_is_shown_where_that_is_asked_for(surface: Surface) -> None:
    choice = text_of(surface, stop=("jumps",), include_stop_str_in_output=True)
    assert joined(add_all(choice, surface.encode("The fox jumps over"))).text == "The fox jumps"


def test_stop_strings_wait_for_min_tokens(surface: Surface) -> None:
    ids = surface.encode("a a a a")
    choice = text_of(surface, stop=("a",), min_tokens=len(ids))
    assert joined(add_all(choice, ids)).stop_reason == "a" and choice.num_generated == len(ids)


def test_the_length_ends_it_and_what_was_held_back_comes(surface: Surface) -> None:
    ids = surface.encode("fox jum")
    choice = text_of(surface, stop=("jumps",), max_new_tokens=len(ids))
    shown = joined(add_all(choice, [*ids, *ids]))
    assert (shown.text, shown.finish_reason) == ("fox jum", "length")


def test_an_expired_choice_shows_what_it_held_back(surface: Surface) -> None:
    choice = text_of(surface, stop=("fox!",))
    add_all(choice, surface.encode("fox"))
    delta = choice.expire()
    assert (delta.text[-2:], delta.finish_reason, delta.stop_reason) == ("ox", "length", "deadline")
    assert choice.finish_reason == "length"


def test_an_end_in_the_middle_of_a_character_shows_that_it_is_incomplete(surface: Surface) -> None:
    choice = text_of(surface)
    add_all(choice, surface.encode("😀")[:-1])
    assert choice.end("stop") == Delta(3, "\ufffd", finish_reason="stop")


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_deltas_that_are_joined_say_the_same(surface: Surface, num_parts: int) -> None:
    def deltas() -> list[Delta]:
        choice = text_of(surface, stop=("dog",))
        return [choice.add(token_id, TokenLogprob(token_id, "", b"", -1.0)) for token_id in surface.encode("a dog")[:6]]

    whole, parts = deltas(), deltas()
    size = max(1, len(parts) // num_parts)
    some = [joined(parts[begin : begin + size]) for begin in range(0, len(parts), size)]
    assert joined(some) == joined(whole)
