"""A tool loop of two steps, as every agent goes through it: a call, and an answer that has read what came of it."""

from __future__ import annotations

import json

from ensemble_server.ensembles.base import GenerationRequest
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel

QUESTION = "Do I need an umbrella in Oslo?"


def weather(request: GenerationRequest, index: int) -> Script:
    """Calls `weather` for Oslo first; answers with what it was told, once it was."""
    last = (request.messages or ())[-1]
    if last["role"] == "tool":
        return Script(("It will ", "be ", f"{last['content']}."))
    return Script(
        ("Let me ", "look.\n<tool", '_call>{"name": "weather", ', '"arguments": {"city": "Os', 'lo"}}</tool_call>')
    )


def assert_was_a_loop(model: ScriptedModel, *, num_steps: int = 2) -> None:
    """The second request has the call and its result, under one id."""
    assert len(model.requests) == num_steps
    assert [tool["function"]["name"] for tool in model.requests[0].tools] == ["weather"]
    *_, called, returned = model.requests[-1].messages or ()
    [call] = called["tool_calls"]
    assert (called["role"], call["function"]["name"]) == ("assistant", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert (returned["role"], returned["tool_call_id"], returned["content"]) == ("tool", call["id"], "rainy in Oslo")
