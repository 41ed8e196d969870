"""Prompts and their answers as windows: each is read whole, in the student's chat template, and its answer is scored.

    <|im_start|>user ... <|im_start|>assistant  |  the answer's tokens, and the mark that ends it
                  context                       |                   scored

The mark has no bytes, and is there where the model ended the answer itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from pydantic import BaseModel, ConfigDict

from ensemble_server.ensembles.errors import ConfigError, EnsembleError
from ensemble_server.server.compare.measures.windows import Window, tokens_and_starts
from ensemble_server.server.distill.answers import Answer
from ensemble_server.server.distill.chats import Prompt, Prompts
from ensemble_server.server.weights.member_views import MemberView

_SHORT = "?"  # stands for any message where only the template's own marks matter


class AnswerCounts(BaseModel):
    """What became of a file's prompts: asked = taught + held_out + unanswered. `cut`: of those taught and held out, the
    answers that a limit ended. `repeats`: prompts that were not asked, since they are held out in another line."""

    model_config = ConfigDict(frozen=True)

    asked: int = 0
    taught: int = 0
    held_out: int = 0
    cut: int = 0
    unanswered: int = 0
    repeats: int = 0


@dataclass(frozen=True)
class Dialogues:
    """`texts_*`: the prompts with their answers. `counts`: by file."""

    train: list[Window] = field(default_factory=list)
    held_out: list[Window] = field(default_factory=list)
    texts_train: list[str] = field(default_factory=list)
    texts_held_out: list[str] = field(default_factory=list)
    counts: Mapping[str, AnswerCounts] = field(default_factory=dict)


def rendered(
    prompts: Sequence[Prompt],
    student: MemberView,
    *,
    limit: int,
    answer_tokens: int = 1,
    strange: Collection[int] = (),
) -> list[list[int]]:
    """The tokens of each prompt in the student's template, up to where the answer begins.

    `limit`: tokens that all who read it can take; an engine would shorten an answer to what the prompt leaves of it, so
    one that leaves less than `answer_tokens` is refused. `strange`: ids that one of them does not know. Raises
    `ConfigError` that names the line which cannot be read.
    """
    found = []
    for prompt in prompts:
        try:
            ids = student.surface.render(prompt.messages)
        except EnsembleError as exc:
            raise ConfigError(f"{prompt.place}: {student.name!r} cannot read it: {exc}") from exc
        if len(ids) + answer_tokens > limit:
            raise ConfigError(
                f"{prompt.place}: has {len(ids)} tokens as {student.name!r} reads it, and an answer may have "
                f"{answer_tokens}; only {limit} fit into the context together. Shorten it, take it out, or ask for "
                "shorter answers (--answer-tokens)"
            )
        if unknown := sorted(set(ids).intersection(strange)):
            token = student.surface.tokenizer.convert_ids_to_tokens(unknown[0])
            raise ConfigError(
                f"{prompt.place}: as {student.name!r} reads it there is the token {token!r}, which not all members "
                "know; take a student with a chat template that all members know"
            )
        found.append(ids)
    return found


def cut_dialogues(
    prompts: Prompts,
    prompt_ids: Sequence[Sequence[int]],
    answers: Sequence[Answer | None],
    student: MemberView,
    *,
    limit: int,
    num_before: int = 0,
) -> Dialogues:
    """`num_before`: documents that stand before these; each answer is one. It ends where `limit` tokens are full.

    Raises `ConfigError` if no answer is left to be taught or to be held out.
    """
    end = end_of_turn(student)
    found = Dialogues()
    counts = {file: {"repeats": number} for file, number in prompts.repeats.items()}
    for place, (prompt, ids, answer) in enumerate(zip(prompts.prompts, prompt_ids, answers, strict=True)):
        window = None if answer is None else _window(ids, answer, student, end, limit, num_before + place)
        happened = ["asked", "unanswered" if window is None else "held_out" if prompt.is_held_out else "taught"]
        if window is not None and answer is not None:
            (found.held_out if prompt.is_held_out else found.train).append(window)
            (found.texts_held_out if prompt.is_held_out else found.texts_train).append(f"{prompt.text}\n{answer.text}")
            happened += [] if answer.is_whole else ["cut"]
        for what in happened:
            counts[prompt.file][what] = counts[prompt.file].get(what, 0) + 1
    if not found.train or not found.held_out:
        raise ConfigError(
            f"chat: no prompt that is to be {'held out' if found.train else 'taught'} has an answer; give other prompts"
        )
    return replace(found, counts={file: AnswerCounts(**numbers) for file, numbers in counts.items()})


def end_of_turn(student: MemberView) -> int | None:
    """The token by which the student's template ends an answer, of those that end its texts; else its tokenizer's."""
    turn = [{"role": "user", "content": _SHORT}, {"role": "assistant", "content": _SHORT}]
    ids = student.surface.render(turn, add_generation_prompt=False)
    last = next((token_id for token_id in reversed(ids) if token_id in student.eos_ids), None)
    own = student.surface.tokenizer.eos_token_id
    return last if last is not None or not isinstance(own, int) else own


def _window(
    prompt_ids: Sequence[int], answer: Answer, student: MemberView, end: int | None, limit: int, document: int
) -> Window | None:
    ids, starts = tokens_and_starts(answer.text, student.surface)
    num_bytes = np.diff(starts)
    if not ids:
        return None
    if answer.is_whole and end is not None:
        ids, num_bytes = [*ids, end], np.append(num_bytes, 0)
    room = limit - len(prompt_ids)
    ids, num_bytes = ids[:room], num_bytes[:room]
    return Window((*prompt_ids, *ids), len(prompt_ids), np.full(len(ids), document), num_bytes)
