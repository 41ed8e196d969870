from __future__ import annotations

from ensemble_server.ensembles.exchange.prompts import Peer, exchange_prompt, round_messages, round_text, with_persona

QUESTION = ({"role": "user", "content": "How many?"},)


def test_a_prompt_has_every_peers_solution_and_says_how_to_end() -> None:
    prompt = exchange_prompt([Peer("ann", "It is 18.\n"), Peer("bob", "It is 20.")], "number")
    assert "ann's solution:\nIt is 18.\n\nbob's solution:\nIt is 20.\n" in prompt
    assert prompt.endswith("where N is your final number.")
    assert "confidence" not in prompt


def test_confidence_is_told_with_its_advice_once_it_is_known() -> None:
    prompt = exchange_prompt([Peer("ann", "It is 18.", 2 / 3), Peer("bob", "It is 20.", 1.0)], "number")
    assert "It is 18.\nann's confidence: 0.67\n" in prompt
    assert "It is 20.\nbob's confidence: 1.00\n" in prompt
    assert "below 0.5" in prompt


def test_each_kind_of_answer_has_its_own_ending() -> None:
    assert len({exchange_prompt([Peer("ann", "x")], kind) for kind in ("number", "choice", "yes_no", "text")}) == 4


def test_a_persona_comes_before_everything_in_a_single_system_prompt() -> None:
    assert with_persona(QUESTION, None) == QUESTION
    assert with_persona(QUESTION, "Be Kitty.") == ({"role": "system", "content": "Be Kitty."}, *QUESTION)
    with_system = ({"role": "system", "content": "Be brief."}, *QUESTION)
    assert with_persona(with_system, "Be Kitty.") == (
        {"role": "system", "content": "Be Kitty.\n\nBe brief."},
        *QUESTION,
    )
    in_parts = ({"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *QUESTION)
    assert [part["text"] for part in with_persona(in_parts, "Be Kitty.")[0]["content"]] == [
        "Be Kitty.\n\n",
        "Be brief.",
    ]


def test_in_a_chat_ones_own_solution_is_the_reply_to_the_question() -> None:
    messages = round_messages(QUESTION, "It is 18.", "Others say 20.")
    assert messages == (
        *QUESTION,
        {"role": "assistant", "content": "It is 18."},
        {"role": "user", "content": "Others say 20."},
    )


def test_in_a_raw_prompt_it_follows_the_question() -> None:
    assert round_text("Q: How many?\nA:", " 18.", "Others say 20.") == "Q: How many?\nA: 18.\n\nOthers say 20.\n\n"
