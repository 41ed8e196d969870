"""The markers between which a model thinks aloud before it answers, as its chat template tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ensemble_server.ensembles.base import THOUGHT_SWITCHES


@dataclass(frozen=True)
class Markers:
    """`start` may stand at the end of the prompt already; `end` is the model's own."""

    start: str
    end: str


def are_told_apart(markers: Sequence[Markers | None]) -> bool:
    """Whether the first of several models that write one text by bytes thinks as all others do that think: its markers
    are those that are looked for."""
    return all(one is None or one == markers[0] for one in markers)


KNOWN = tuple(
    Markers(start, end)
    for start, end in (
        ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM, SmolLM3
        ("[THINK]", "[/THINK]"),  # Magistral
        ("<seed:think>", "</seed:think>"),  # Seed-OSS
        ("◁think▷", "◁/think▷"),  # Kimi
        ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
        ("<thinking>", "</thinking>"),
        ("<reasoning>", "</reasoning>"),
    )
)


_STATEMENT = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_SETTING = re.compile(rf"(?<![\w.])({'|'.join(('reasoning_effort', *THOUGHT_SWITCHES))})\b")


def settings_in(template: str | None) -> frozenset[str]:
    """What a chat template asks about how much to think: "{% if enable_thinking %}" -> {"enable_thinking"}"""
    code = " ".join(_QUOTED.sub("", statement) for statement in _STATEMENT.findall(template or ""))
    return frozenset(_SETTING.findall(code))


def markers_in(template: str | None) -> Markers | None:
    """Those that a chat template has: a template that opens thoughts, or takes them out of earlier turns, names one."""
    if template is None:
        return None
    return next((markers for markers in KNOWN if markers.start in template or markers.end in template), None)
