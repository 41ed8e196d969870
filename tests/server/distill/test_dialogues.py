"""Answers behind their prompts: which tokens are scored, and what they count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.distill.answers import Answer
from ensemble_server.server.distill.chats import Prompt, Prompts
from ensemble_server.server.distill.dialogues import AnswerCounts, cut_dialogues, end_of_turn, rendered
from ensemble_server.server.distill.lessons import Lessons
from ensemble_server.server.distill.loss import loss_of, token_losses
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.tokenizer import load_tokenizer
from ensemble_server.server.weights.view import Surface


@pytest.fixture
def student(tiny: dict[str, Path]) -> MemberView:
    return MemberView("llama", Surface(load_tokenizer(tiny["llama"])), frozenset({0, 2}), 512, 320, 336)


def asked(*texts: str) -> Prompts:
    """The last is held out."""
    return Prompts(
        tuple(
            Prompt("p.jsonl", line, (), ({"role": "user", "content": text},), is_held_out=line == len(texts))
            for line, text in enumerate(texts, start=1)
        ),
        ("",),
        {"p.jsonl": 0},
    )


def decoded(student: MemberView, ids: tuple[int, ...]) -> str:
    return student.surface.tokenizer.decode(ids)


def test_the_answer_and_its_end_are_scored_and_the_prompt_is_not(student: MemberView) -> None:
    prompts = asked("To be?", "Not to be?")
    ids = rendered(prompts.prompts, student, limit=512)
    found = cut_dialogues(prompts, ids, [Answer("Ünï 数", True), Answer("no", False)], student, limit=512, num_before=3)
    [window], [other] = found.train, found.held_out
    assert decoded(student, window.token_ids[: window.first_scored]) == (
        "<|im_start|>user\nTo be?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert decoded(student, window.token_ids[window.first_scored :]) == "Ünï 数<|im_end|>"
    assert window.num_bytes.sum() == len("Ünï 数".encode())
    assert window.num_bytes[-1] == 0
    assert set(window.documents) == {3} and set(other.documents) == {4}
    assert decoded(student, other.token_ids[other.first_scored :]) == "no", "a limit ended it: there is no end to learn"
    assert found.counts == {"p.jsonl": AnswerCounts(asked=2, taught=1, held_out=1, cut=1)}
    assert found.texts_train == ["To be?\nÜnï 数"]


def test_the_loss_is_the_cross_entropy_of_the_answers_tokens_alone(student: MemberView) -> None:
    prompts = asked("To be?", "Or?", "Not to be?")
    answers = [Answer("that is the question", True), Answer("x", True), Answer("no", True)]
    windows = cut_dialogues(prompts, rendered(prompts.prompts, student, limit=512), answers, student, limit=512).train
    batch = Lessons(windows).batch([0, 1])
    logits = torch.randn(*batch.tokens.shape, 320, generator=torch.Generator().manual_seed(0))
    expected = [
        -logits[row].double().log_softmax(-1)[place - 1, window.token_ids[place]].item()
        for row, window in enumerate(windows)
        for place in range(window.first_scored, len(window.token_ids))
    ]
    clm, kl = token_losses(logits, batch)
    assert kl is None
    assert clm.numpy() == pytest.approx(expected, abs=1e-5)
    changed = logits.clone()
    for row, window in enumerate(windows):
        changed[row, : window.first_scored - 1] += torch.randn(320)
    assert torch.equal(loss_of(token_losses(changed, batch)[0], None, 0.5), loss_of(clm, None, 0.5))


def test_prompts_without_an_answer_are_left_out_and_counted(student: MemberView) -> None:
    prompts = asked("a", "b", "c")
    ids = rendered(prompts.prompts, student, limit=512)
    found = cut_dialogues(prompts, ids, [None, Answer("x", True), Answer("y", True)], student, limit=512)
    assert found.counts["p.jsonl"] == AnswerCounts(asked=3, taught=1, held_out=1, unanswered=1)
    with pytest.raises(ConfigError, match="no prompt that is to be held out has an answer"):
        cut_dialogues(prompts, ids, [Answer("x", True), None, None], student, limit=512)


def test_an_answer_ends_where_the_context_does(student: MemberView) -> None:
    prompts = asked("a", "b")
    ids = rendered(prompts.prompts, student, limit=512)
    limit = len(ids[0]) + 2
    [window] = cut_dialogues(prompts, ids, [Answer("12345", True), Answer("x", True)], student, limit=limit).train
    assert decoded(student, window.token_ids[window.first_scored :]) == "12"
    assert np.array_equal(window.num_bytes, [1, 1])


def test_prompts_that_cannot_be_read_are_named(student: MemberView) -> None:
    prompts = asked("To be?", "or " * 100)
    with pytest.raises(ConfigError, match=r"p\.jsonl, line 2: has .* tokens as 'llama' reads it"):
        rendered(prompts.prompts, student, limit=60)
    with pytest.raises(
        ConfigError, match=r"line 1: .* there is the token '<\|im_start\|>', which not all members know"
    ):
        rendered(prompts.prompts, student, limit=512, strange={1})


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_with_the_way_out(student: MemberView) -> None:
    """An engine would have shortened the answer to what is left."""
    prompts = asked("To be?")
    length = len(rendered(prompts.prompts, student, limit=512)[0])
    assert rendered(prompts.prompts, student, limit=length + 9, answer_tokens=9)
    with pytest.raises(ConfigError, match=rf"line 1: has {length} tokens .* may have 10; only {length + 9} fit"):
        rendered(prompts.prompts, student, limit=length + 9, answer_tokens=10)


def test_the_end_of_a_turn_is_the_templates_own(student: MemberView) -> None:
    assert end_of_turn(student) == 2  # <|im_end|>, and not the text's <|endoftext|>, which ends generation too
