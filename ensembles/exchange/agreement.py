"""When an exchange ends, and with which answer: a pure function of its transcript, for the live method and for replays.

    confidence of a participant = how often it gave its most frequent answer / how often it replied
    votes for an answer         = sum over those whose latest reply has it of weight * confidence  (or of weight alone)

An exchange stops, in this order of reasons:
- unanimity (if configured): the latest replies of all who ever replied have one and the same answer;
- majority (if configured): one answer has more than half of their weight;
- all_left: nobody is left to speak. Who repeats its answer leaves (if "repeat" is configured), who falls silent is not
  asked again, and who has nobody to hear speaks only once. What they said last still counts and is still heard;
- max_rounds, token_budget, time_budget.

The answer is the one agreed on, else the one with most votes (a tie goes to the answer whose first voter comes first).
The spokesperson is the most confident of those whose latest reply has it (a tie goes to the first). If nobody's latest
reply has an answer, there is none, and the first participant that ever replied speaks.

Reference: Yin et al., "Exchange-of-Thought", 2023, sections 3.2 and 3.3, https://arxiv.org/abs/2312.01823
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ensemble_server.ensembles.exchange.transcript import Reply, Round, Settings, State, StopReason, Transcript
from ensemble_server.ensembles.voting.majority import TOLERANCE, plurality, tally

if TYPE_CHECKING:
    import numpy as np


def judge(settings: Settings, rounds: Sequence[Round]) -> State:
    """What follows from the rounds so far. Somebody must have replied."""
    history = {name: [round_.replies[name] for round_ in rounds if name in round_.replies] for name in settings.names}
    latest = {name: replies[-1] for name, replies in history.items() if replies}
    assert latest, "an exchange in which nobody replied has no state"
    confidence = {name: confidence_of([reply.answer for reply in history[name]]) for name in latest}
    silent = {name for round_ in rounds for name in round_.silent}
    speaking = tuple(
        name
        for name in settings.names
        if name not in silent
        and any(peer in latest for peer in settings.hears.get(name, ()))
        and not ("repeat" in settings.stop and _repeats(history[name]))
    )
    answers = [reply.answer for reply in latest.values()]
    weights = [participant.weight for participant in settings.participants if participant.name in latest]
    agreement, agreed = _agreement(settings, answers, weights)
    if settings.final == "confidence":
        weights = [weight * confidence[name] for name, weight in zip(latest, weights, strict=True)]
    stop = agreement or _exhaustion(settings, rounds, speaking)
    answer = agreed if agreement else plurality(answers, weights)
    speakers = [name for name, reply in latest.items() if reply.answer == answer] if answer is not None else []
    return State(
        confidence=confidence,
        votes=tally(answers, weights),
        stop=stop,
        speaking=() if stop else speaking,
        answer=answer,
        spokesperson=max(speakers, key=lambda name: confidence[name]) if speakers else next(iter(latest)),
    )


def confidence_of(answers: Sequence[str | None]) -> float:
    """["18", "20", "18", None] -> 0.5; abstentions count as replies, not as an answer."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts.values(), default=0) / len(answers)


def _repeats(replies: Sequence[Reply]) -> bool:
    return any(before.answer is not None and before.answer == after.answer for before, after in pairwise(replies))


def _agreement(
    settings: Settings, answers: Sequence[str | None], weights: Sequence[float]
) -> tuple[StopReason | None, str | None]:
    answer = plurality(answers, weights)
    if answer is None:
        return None, None
    if "unanimity" in settings.stop and all(other == answer for other in answers):
        return "unanimity", answer
    if "majority" in settings.stop and tally(answers, weights)[answer] > sum(weights) / 2 + TOLERANCE:
        return "majority", answer
    return None, None


def _exhaustion(settings: Settings, rounds: Sequence[Round], speaking: Sequence[str]) -> StopReason | None:
    if not speaking:
        return "all_left"
    if len(rounds) > settings.max_rounds:
        return "max_rounds"
    left = tokens_left(settings, rounds)
    if left is not None and left < len(speaking):  # not even one token for each
        return "token_budget"
    if settings.time_budget_s is not None and rounds[-1].elapsed_s >= settings.time_budget_s:
        return "time_budget"
    return None


def tokens_left(settings: Settings, rounds: Sequence[Round]) -> int | None:
    """How many tokens may still be written; None without a budget."""
    if settings.token_budget is None:
        return None
    return settings.token_budget - sum(round_.num_tokens for round_ in rounds)


def merge_alike(texts: Sequence[str], similarity: np.ndarray, threshold: float) -> list[str]:
    """Each text, or the earlier one that stands for it: the most similar of those at or above `threshold`.

    texts: in order of appearance; similarity: (n, n). What stands for others is never merged itself, so the answers of
    earlier rounds keep their spelling when they come first.
    """
    standing: list[int] = []
    stands_for: dict[str, str] = {}
    for index, text in enumerate(texts):
        if text in stands_for:
            continue
        best = max(standing, key=lambda other: similarity[index, other], default=None)
        if best is not None and similarity[index, best] >= threshold:
            stands_for[text] = texts[best]
        else:
            standing.append(index)
            stands_for[text] = text
    return [stands_for[text] for text in texts]


def replay(transcript: Transcript) -> tuple[list[State], list[str]]:
    """The states that follow from the transcript's settings and rounds, up to the first stop; and how they differ
    from those that it records, in sentences. No sentence: the same stops and the same answer."""
    settings, rounds = transcript.settings, transcript.rounds
    states: list[State] = []
    differences: list[str] = []
    speaking = settings.names
    for index in range(len(rounds)):
        spoke = {*rounds[index].replies, *rounds[index].silent}
        if spoke != set(speaking):
            differences.append(f"round {index}: {_names(spoke)} spoke, but it was the turn of {_names(speaking)}")
        states.append(judge(settings, rounds[: index + 1]))
        if states[-1].stop:
            break
        speaking = states[-1].speaking
    if len(states) < len(rounds):
        stop = f"round {len(states) - 1} ({states[-1].stop})"
        differences.append(f"stops after {stop}, but {len(rounds)} rounds are recorded")
    elif not states[-1].stop:
        differences.append(f"goes on after round {len(rounds) - 1}, the last that is recorded")
    if len(transcript.states) != len(rounds):
        differences.append(f"{len(rounds)} rounds, but {len(transcript.states)} states are recorded")
    for index, (found, recorded) in enumerate(zip(states, transcript.states, strict=False)):
        for field in State.model_fields:
            if getattr(found, field) != getattr(recorded, field):
                differences.append(
                    f"round {index}: {field} is {getattr(found, field)!r}, recorded is {getattr(recorded, field)!r}"
                )
    return states, differences


def _names(names: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"
