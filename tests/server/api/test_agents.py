"""What coding agents send, made short: Claude Code 2.1.332 (`claude -p`) and Codex 0.171.0 (`codex exec`), as they
sent it to this server when they were driven against it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ensemble_server.ensembles.base import GenerationRequest
from ensemble_server.server.engines.scripted_engine import Script
from ensemble_server.server.weights.view import Surface
from tests.conftest import CHAT_TEMPLATE
from tests.server.api.conftest import asgi_client, named_events_of

OBJECT = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": {}}
BASH = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
CALL = '<tool_call>{{"name": "{}", "arguments": {{"{}": "echo hi"}}}}</tool_call>'

# As Qwen3.5's, Gemma's and Mistral's templates are: one system message, at the head; user and assistant take turns.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}{% if m.role == 'user' and not loop.first and loop.previtem.role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<tool_call>...</tool_call>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = CHAT_TEMPLATE + "{% if tools %}{{ tools | tojson }}<tool_call>...</tool_call>{% endif %}"


def claude_code(*more: dict[str, Any]) -> dict[str, Any]:
    cached = {"cache_control": {"type": "ephemeral"}}
    text = [{"type": "text", "text": "<system-reminder>\nAttribution\n</system-reminder>"}]
    environment = [{"type": "text", "text": "# Environment", **cached}]
    return {
        "model": "m",
        "messages": [
            {"role": "user", "content": [*text, {"type": "text", "text": "Say hi with a tool."}]},
            {"role": "system", "content": environment if not more else "# Environment"},
            *more,
        ],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.1c9; cc_entrypoint=sdk-cli;"},
            {"type": "text", "text": "You are an agent.", **cached},
            {"type": "text", "text": "\nYou work with the user.", **cached},
        ],
        "tools": [
            {"name": "Agent", "description": "Launches one", "input_schema": OBJECT},
            {"name": "Bash", "description": "Runs a command", "input_schema": BASH},
        ],
        "metadata": {"user_id": '{"device_id":"c7","account_uuid":"","session_id":"a0"}'},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }


def codex(*more: dict[str, Any]) -> dict[str, Any]:
    def message(role: str, *texts: str) -> dict[str, Any]:
        content = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "id": "msg_01", "role": role, "content": content}

    return {
        "model": "m",
        "stream": True,
        "input": [
            message("developer", "You are a coding agent."),
            message("developer", "<skills_instructions>", "<permissions instructions>"),
            message("user", "<environment_context>"),
            message("user", "Say hi with a tool."),
            *more,
        ],
        "tools": [
            {"type": "function", "name": "exec_command", "strict": False, "parameters": BASH},
            {"type": "namespace", "name": "multi_agent_v1", "tools": [{"type": "function", "name": "spawn"}]},
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "high", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a2",
        "client_metadata": {"session_id": "01a2", "x-codex-window-id": "01a2:0"},
    }


def calls_then_tells(request: GenerationRequest, index: int) -> Script:
    assert request.messages, "a chat"
    last = request.messages[-1]
    if last["role"] == "tool":
        return Script(("It says ", last["content"]))
    name = request.tools[-1]["function"]["name"]
    call = CALL.format(name, "command")
    return Script(("Let me look. ", call[:25], call[25:]))


@pytest.fixture(params=["lenient", "strict"])
def house(request, host, surface):
    template = {"lenient": TOOLS, "strict": STRICT}[request.param]
    return host(m=calls_then_tells, surface=Surface(surface.tokenizer, chat_template=template))


async def streamed(house, path, body):
    async with asgi_client(house) as client:
        response = await client.post(path, json=body, headers={"x-api-key": "none"})
    assert response.status_code == 200, response.text
    events = [json.loads(data) for _, data in named_events_of(response.text)]
    return response.headers.get("x-ignored-parameters"), events


async def test_claude_code_calls_a_tool_and_goes_on(house):
    ignored, events = await streamed(house, "/v1/messages?beta=true", claude_code())
    assert ignored == "output_config.effort"
    assert not any("billing" in message["content"] for message in house.models["m"].requests[-1].messages)
    [call] = [event["content_block"] for event in events if event.get("content_block", {}).get("type") == "tool_use"]
    assert call["name"] == "Bash"
    used = {"type": "tool_use", "id": call["id"], "name": "Bash", "input": {"command": "echo hi"}}
    result = {"tool_use_id": call["id"], "type": "tool_result", "content": "hi", "is_error": False}
    _, events = await streamed(
        house,
        "/v1/messages?beta=true",
        claude_code(
            {"role": "assistant", "content": [{"type": "text", "text": "Let me look."}, used]},
            {"role": "user", "content": [result | {"cache_control": {"type": "ephemeral"}}]},
        ),
    )
    texts = [event["delta"]["text"] for event in events if event.get("delta", {}).get("type") == "text_delta"]
    assert "".join(texts) == "It says hi"


async def test_codex_calls_a_tool_and_goes_on(house):
    ignored, events = await streamed(house, "/v1/responses", codex())
    assert ignored == "client_metadata, tools[1]:namespace, tools[2]:web_search, reasoning.effort"
    done = events[-1]["response"]
    said, call = done["output"]
    assert (call["name"], json.loads(call["arguments"])) == ("exec_command", {"command": "echo hi"})
    output = {"type": "function_call_output", "id": "fco_01", "call_id": call["call_id"], "output": "hi"}
    _, events = await streamed(house, "/v1/responses", codex(said, call, output))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "It says hi"


async def test_claude_codes_prompt_can_be_counted(house):
    body = claude_code()
    for name in ("max_tokens", "stream", "metadata"):
        del body[name]
    async with asgi_client(house) as client:
        response = await client.post("/v1/messages/count_tokens?beta=true", json=body)
    assert response.status_code == 200 and response.json()["input_tokens"] > 50, response.text
