"""What a chat template tells about thoughts."""

from __future__ import annotations

import pytest

from ensemble_server.server.weights.thinking import Markers, markers_in, settings_in


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        ("{%- if enable_thinking is defined and enable_thinking is false %}", {"enable_thinking"}),  # Qwen3
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}", {"thinking"}),  # DeepSeek V3.1
        ('{{- "Reasoning: " + reasoning_effort + "\\n\\n" }}', {"reasoning_effort"}),  # gpt-oss
        ("{{ message.thinking }}{{ message['thinking'] }}thinking {# thinking #}", set()),
        ("", set()),
        (None, set()),
    ],
)
def test_settings_are_what_a_template_asks_for(template, settings):
    assert settings_in(template) == settings


def test_markers_are_those_that_a_template_has():
    assert markers_in("{{ '<think>' }}") == Markers("<think>", "</think>")
    assert markers_in("{{ content.split('[/THINK]')[-1] }}") == Markers("[THINK]", "[/THINK]")
    assert markers_in("plain") is None and markers_in(None) is None
