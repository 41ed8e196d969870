from __future__ import annotations

from itertools import pairwise

from ensemble_server.server.engines.transformers_engine.text_drafts import TextDrafts


def test_what_followed_the_last_tokens_before_is_drafted():
    assert TextDrafts([1, 2, 3, 4, 5, 9, 1, 2, 3]).draft(3) == [4, 5, 9]


def test_of_several_places_the_latest_counts():
    assert TextDrafts([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).draft(1) == [5]


def test_three_tokens_that_match_are_worth_more_than_two():
    assert TextDrafts([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).draft(1) == [4]
    assert TextDrafts([8, 2, 3, 4, 9, 7, 2, 3]).draft(1) == [4]


def test_nothing_is_drafted_where_nothing_repeats():
    for tokens in ([], [1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 1]):
        assert TextDrafts(tokens).draft(4) == []


def test_a_text_that_goes_round_in_a_circle_is_drafted_for_ever():
    assert TextDrafts([1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]
    assert TextDrafts([5, 5, 5]).draft(4) == [5, 5, 5, 5]


def test_a_place_is_followed_while_it_is_right():
    text = TextDrafts([1, 2, 3, 4, 5, 6, 0, 1, 2, 3])
    text.add(4)
    assert text.draft(2) == [5, 6]
    text.add(7)
    assert text.draft(2) == []
    for token_id in (1, 2, 3):
        text.add(token_id)
    assert text.draft(1) == [4]
    text.add(4)
    assert text.draft(1) == [7], "the latest place again"


def test_choices_go_their_own_ways_from_one_prompt():
    prompt = TextDrafts([1, 2, 3, 4, 5, 1, 2])
    one, other = prompt.fork(), prompt.fork()
    one.add(3)
    other.add(9)
    assert (one.draft(2), other.draft(2)) == ([4, 5], [])
    for token_id in (2, 9):
        one.add(token_id)
        other.add(token_id)
    assert one.draft(1) == []
    other.add(2)
    other.add(9)
    assert other.draft(1) == [2]


def test_chances_fall_along_a_draft_and_follow_what_came_true():
    text = TextDrafts([1, 2, 3, 1, 2, 3, 1, 2])
    before = text.chances(6)
    assert all(0 < later < earlier < 1 for earlier, later in pairwise(before))
    for token_id in (3, 1, 2) * 10:
        text.add(token_id)
    assert text.chances(4)[-1] > 0.8
    assert text.chances(1)[0] > before[0]


def test_chances_sink_while_drafts_are_wrong_and_rise_by_themselves():
    text = TextDrafts([1, 2])
    for token_id in range(100, 160):  # "1 2" comes again and again, each time with something else behind it
        for next_id in (token_id, 1, 2):
            text.add(next_id)
    assert text.chances(1)[0] < 0.1
    for token_id in (3, 1, 2) * 10:
        text.add(token_id)
    assert text.chances(1)[0] > 0.8
