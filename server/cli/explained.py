"""An answer whose tokens have the colour of the member that drove them, and what else its explanation says.

A member's share of a token is its part of the token's probability, as the page at `/` has it:

    share of member k = w_k p_k / Σ_j w_j p_j         over members of positive weight; a negative one drives nothing

Without colours (NO_COLOR, a plain terminal) a run of tokens begins with the name of its member.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ensemble_server.ensembles.base import Delta, MemberToken, TokenLogprob

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
SURE = 0.5  # a driver with a smaller share is shown fainter
MAX_SHOWN_CHARS = 60


def shares(members: Mapping[str, MemberToken]) -> dict[str, float]:
    """Each member's share of a token: (p 0.6 at weight 1, p 0.2 at weight 1) -> 0.75, 0.25. They sum to 1, or are all
    0 where no member of positive weight finds the token possible."""
    driving = {name: view for name, view in members.items() if view.weight > 0}
    best = max((view.logprob for view in driving.values()), default=-math.inf)
    if best == -math.inf:
        return dict.fromkeys(members, 0.0)
    parts = {name: view.weight * math.exp(view.logprob - best) for name, view in driving.items()}
    total = sum(parts.values())
    return {name: parts.get(name, 0.0) / total for name in members}


def visible(text: str) -> str:
    """Without what a terminal would obey: a model may say escape codes."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


class ExplainedAnswer:
    """Shows the pieces of one answer, and afterwards who drove how much of it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_colours = console.color_system is not None and not console.no_color
        self._colours: dict[str, str] = {}
        self._driver: str | None = None
        self._totals: dict[str, float] = {}
        self._num_tokens = 0

    def show(self, delta: Delta) -> None:
        """The text of a piece, each token in its driver's colour; as a whole where its text is not that of its tokens
        (a character that several of them make up)."""
        counted = [(token, self._count(token)) for token in delta.tokens]
        if "".join(token.text for token, _ in counted) == delta.text:
            for token, driven in counted:
                self._print(token.text, driven)
        else:
            self._print(delta.text, next((driven for _, driven in reversed(counted) if driven), None))

    def _count(self, token: TokenLogprob) -> tuple[str, float] | None:
        """The token's driver and its share."""
        found = shares(token.members or {})
        if not any(found.values()):
            return None
        self._num_tokens += 1
        for name, share in found.items():
            self._totals[name] = self._totals.get(name, 0.0) + share
            self._colours.setdefault(name, COLOURS[len(self._colours) % len(COLOURS)])
        return max(found.items(), key=lambda item: item[1])

    def _print(self, text: str, driven: tuple[str, float] | None) -> None:
        name, share = driven or (None, 0.0)
        if not self._has_colours and name != self._driver and name is not None:
            self._console.print(f"⟨{name}⟩", end="", markup=False, highlight=False, soft_wrap=True)
        self._driver = name
        style = None
        if name is not None and self._has_colours:
            style = self._colours[name] if share >= SURE else f"dim {self._colours[name]}"
        self._console.print(visible(text), end="", markup=False, highlight=False, soft_wrap=True, style=style)

    def print_summary(self, trace: Mapping[str, Any] | None) -> None:
        """Each member's mean share of the tokens, and what the method tells: votes, scores, gates, who was silent."""
        if self._num_tokens:
            for name, total in sorted(self._totals.items(), key=lambda item: -item[1]):
                line = f"{name}  {total / self._num_tokens:.0%}"
                self._console.print(
                    line, markup=False, highlight=False, style=self._colours[name] if self._has_colours else None
                )
        for line in trace_lines(trace or {}):
            self._console.print(visible(line), markup=False, highlight=False, style="dim", soft_wrap=True)


def trace_lines(trace: Mapping[str, Any]) -> Iterator[str]:
    """What a method's trace tells in few words: numbers by name, single values, and a line per candidate."""
    scores = trace.get("scores")
    for key, value in trace.items():
        if key == "candidates" and isinstance(value, list):
            for place, candidate in enumerate(value):
                score = f"  {scores[place]:.3g}" if isinstance(scores, list) and place < len(scores) else ""
                yield f"{candidate.get('member')} {candidate.get('sample')}{score}  {_shortened(candidate.get('text'))}"
        elif key == "silent" and isinstance(value, list):
            yield from (f"{silent.get('member')} was silent: {silent.get('reason')}" for silent in value)
        elif isinstance(value, dict) and value and all(isinstance(part, int | float) for part in value.values()):
            yield f"{key}: " + ", ".join(f"{name} {number:.3g}" for name, number in value.items())
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}"


def _shortened(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_SHOWN_CHARS else line[: MAX_SHOWN_CHARS - 1] + "…"
