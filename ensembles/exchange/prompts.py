"""What participants are told: their persona, and in each round the solutions of those whom they hear.

The parts are those of the paper's prompts: the question, one's own solution, the peers' solutions, from round 2 on
their confidence with the advice that less than 0.5 speaks against a solution and much does not prove it, and how to
end. The question and one's own solution stay what they are in a chat, its messages; only the rest is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ensemble_server.ensembles.base import Message
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind

ENDINGS: dict[AnswerKind, str] = {
    "number": 'End with the sentence "The answer is N.", where N is your final number.',
    "choice": 'End with the sentence "The answer is X.", where X is the letter of the option that you choose.',
    "yes_no": 'End with the sentence "The answer is yes." or "The answer is no."',
    "text": "Write the answer itself and nothing about how it came about.",
}


NOBODY = "Nobody else has come to a solution yet."
UNFINISHED = "I did not come to a solution."  # one's own words, where a turn ended in thoughts


@dataclass(frozen=True)
class Peer:
    """Someone who is heard. `confidence` is None as long as it is not told."""

    name: str
    solution: str
    confidence: float | None = None


def exchange_prompt(peers: Sequence[Peer], answer: AnswerKind) -> str:
    """What a participant reads in a round, besides the question and its own solution."""
    parts = ["Here is what others answered to the same question." if peers else NOBODY]
    for peer in peers:
        part = f"{peer.name}'s solution:\n{peer.solution.strip()}"
        if peer.confidence is not None:
            part += f"\n{peer.name}'s confidence: {peer.confidence:.2f}"
        parts.append(part)
    advice = "Compare these with your own solution and check every step." if peers else "Check your own, step by step."
    if any(peer.confidence is not None for peer in peers):
        advice += (
            " A confidence below 0.5 means that its owner keeps changing the answer, which is then likely to be wrong;"
            " but a high confidence can be wrong as well."
        )
    parts.append(f"{advice} Then give your own solution anew, without comments on the others. {ENDINGS[answer]}")
    return "\n\n".join(parts)


def with_persona(messages: Sequence[Message], persona: str | None) -> tuple[Message, ...]:
    """`messages` with the persona as their system prompt, before one that is there already: templates take only one."""
    if persona is None:
        return tuple(messages)
    if messages and messages[0]["role"] == "system":
        return ({"role": "system", "content": _prefixed(persona, messages[0]["content"])}, *messages[1:])
    return ({"role": "system", "content": persona}, *messages)


def _prefixed(persona: str, content: str | Sequence[Message]) -> str | list[Message]:
    """Content is a text, or a list of OpenAI's content parts."""
    if isinstance(content, str):
        return f"{persona}\n\n{content}"
    return [{"type": "text", "text": f"{persona}\n\n"}, *content]


def round_messages(messages: Sequence[Message], own_solution: str, prompt: str) -> tuple[Message, ...]:
    """The conversation, one's own last solution as the reply to it, and the round's prompt."""
    return (*messages, {"role": "assistant", "content": own_solution}, {"role": "user", "content": prompt})


def round_text(question: str, own_solution: str, prompt: str) -> str:
    """The same for a raw prompt."""
    return f"{question}{own_solution}\n\n{prompt}\n\n"
