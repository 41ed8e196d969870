"""What a text says once its thoughts are left out: the blocks in which reasoning models think aloud before they answer.

A thought is no answer: it names numbers and options that are given up later. Votes, similarities, extraction, judges,
aggregators and peers in an exchange read what `without_thoughts` leaves; what a client is shown stays whole.

A block stands between an opening and a closing marker: `<think>`, `<thinking>`, `<thought>`, `<reasoning>` and their
like, `[THINK]` (Magistral), `◁think▷` (Kimi), `<|START_THINKING|>` (Command A), `<|begin_of_thought|>` (OpenThinker),
`<|channel>thought` (Gemma), `<unused94>thought` (MedGemma), the channels of gpt-oss, and the sections that chat pages
fold away, `<details type="reasoning" ...>` (Open WebUI, which folds calls of tools and code the same way). All count as
one kind of bracket, and blocks may nest. Chat templates often end with the opening marker, and an answer may be cut off
in its thoughts, so either end may be missing: what stands before a closing marker that nothing opened is thought, and
so is all after an opening one that nothing closes. A marker in `backticks` is a word about markers.
"""

from __future__ import annotations

import re

Span = tuple[int, int]  # start and end, counted in characters

_NAMES = (  # also of one maker: <seed:think>, <longcat_think>
    r"(?:(?:ant|(?:[a-z]{1,12}[:_]){1,2})?(?:think|thinking|thoughts?|monologue)(?:_process)?"
    r"|reasoning|reflection|scratchpad|cot)"
)
_MARKER = re.compile(
    rf"""(?<!`)(?:
      (?P<opens>
          <\s*{_NAMES}(?:\s+\w+=[^<>]*)?\s*> | \[(?:THINK|THINKING)\] | ◁think▷ | <\|start_thinking\|>
        | <\|begin_of_(?:thought|thinking)\|> | <\|channel>thought\b | <unused94>\s*thought\b
        | <\|channel\|>\s*(?:analysis|commentary)\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>
      )
    | (?P<closes>
          <\s*/\s*{_NAMES}\s*> | \[/(?:THINK|THINKING)\] | ◁/think▷ | <\|end_thinking\|>(?:\s*<\|start_response\|>)?
        | <\|end_of_(?:thought|thinking)\|>(?:\s*<\|begin_of_solution\|>)?
        | <channel\|> | <unused95> | (?-i:assistantfinal)
        | (?:<\|end\|>\s*)?(?:<\|start\|>\s*assistant\s*)?<\|channel\|>\s*final\b[^<]*<\|message\|>
      )
    | (?P<section><\s*details\b[^<>]*+>) | (?P<section_end><\s*/\s*details\s*>))(?!`)""",
    re.IGNORECASE | re.VERBOSE,
)
_FOLDED_AWAY = re.compile(
    r"""\btype\s*=\s*["']?(?:reasoning|thinking|thoughts?|tool_calls?|code_interpreter)\b""", re.IGNORECASE
)


def without_thoughts(text: str) -> str:
    """ "<think>9 * 2 is 18</think> She makes $18." -> "She makes $18." A text without thoughts stays as it is."""
    thoughts = thought_spans(text)
    if not thoughts:
        return text
    starts = [0, *(end for _, end in thoughts)]
    ends = [*(start for start, _ in thoughts), len(text)]
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True)).strip()


def thought_spans(text: str) -> list[Span]:
    """Where the thoughts stand, markers included, in order and apart; empty for a text without any."""
    markers = _markers(text)
    closings = [place for place, (_, _, opens) in enumerate(markers) if not opens]
    spans: list[Span] = []
    place = 0
    while place < len(markers):
        start, end, opens = markers[place]
        if opens:
            place = _closing(markers, place, closings[-1] if closings else -1)
            spans.append((start, markers[place - 1][1] if not markers[place - 1][2] else len(text)))
        else:
            place += 1
            # Nothing opened it: all so far was thought, unless that was the answer and nothing comes after it.
            is_last_word = bool(spans) and not text[end:].strip()
            spans = [*spans, (start, end)] if is_last_word else [(0, end)]
    return spans


def _markers(text: str) -> list[tuple[int, int, bool]]:
    """Start, end and whether it opens a block, of every marker. A section that is folded for other reasons than thought
    is none, nor is its end, or one that nothing opened."""
    found: list[tuple[int, int, bool]] = []
    sections: list[bool] = []  # those that are open, and whether they are thoughts
    for match in _MARKER.finditer(text):
        opens = match.group("opens") is not None
        if section := match.group("section"):
            sections.append(opens := _FOLDED_AWAY.search(section) is not None)
            if not opens:
                continue
        elif match.group("section_end") and not (sections and sections.pop()):
            continue
        found.append((match.start(), match.end(), opens))
    return found


def _closing(markers: list[tuple[int, int, bool]], place: int, last_closing: int) -> int:
    """The place after the marker that closes the one at `place`; without a partner, the last closing one; or the end.

    Markers that are talked about inside a block ("I should use <think> here") leave it without a partner.
    """
    depth = 0
    for other in range(place, len(markers)):
        depth += 1 if markers[other][2] else -1
        if depth == 0:
            return other + 1
    return last_closing + 1 if last_closing > place else len(markers)
