"""From a body of content blocks to the chat that it asks for."""

from __future__ import annotations

import json
from typing import Any

from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.requests.anthropic_messages.body import (
    CustomTool,
    DocumentBlock,
    InputMessage,
    MessagesBody,
    OtherTool,
    PromptPart,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from ensemble_server.server.requests.messages import FunctionDefinition, FunctionName, NamedTool, Tool
from ensemble_server.server.requests.protocol import (
    ChatBody,
    Controls,
    JSONSchemaFormat,
    ResponseFormat,
    StreamOptions,
)
from ensemble_server.server.requests.turns import Turns

# a chat's parameters -> what they are called here
NAMES = {
    "response_format": "output_config.format",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
}


_BILLING = "x-anthropic-billing-header:"  # Claude Code's first words, others each time: no prompt would be known again


def chat_body(body: PromptPart, model: str | None) -> ChatBody:
    """What `body` asks of a chat. Raises `RequestError`."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": turns_of(body).messages,
        "chat_template_kwargs": body.chat_template_kwargs,
        "thinking": body.thinking,
        "reasoning_effort": body.output_config.effort if body.output_config else None,
        "max_reasoning_tokens": body.max_reasoning_tokens,
    }
    asked |= _tools(body)
    if isinstance(body, MessagesBody):
        asked |= {name: getattr(body, name) for name in Controls.model_fields}
        asked |= {
            "stream": True,
            "stream_options": StreamOptions(include_usage=True, continuous_usage_stats=True),
            "max_completion_tokens": body.max_tokens,
            "stop": stop_sequences(body),
            "response_format": _response_format(body),
        }
    return ChatBody.model_construct(**asked)


def stop_sequences(body: MessagesBody) -> list[str]:
    more = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [*(body.stop_sequences or ()), *more]


def turns_of(body: PromptPart) -> Turns:
    if body.messages[-1].role == "assistant":
        raise UnsupportedError(
            "the last message is the assistant's, and answers cannot be begun for it: end with one of the user, or use "
            "/v1/completions to continue a text",
            param="messages",
        )
    turns = Turns()
    if body.system:
        texts = [body.system] if isinstance(body.system, str) else [block.text for block in body.system]
        if said := [text for text in texts if not text.startswith(_BILLING)]:
            turns.system("\n\n".join(said))
    for place, message in enumerate(body.messages):
        _add_message(turns, message, f"messages[{place}]")
    return turns


def _add_message(turns: Turns, message: InputMessage, at: str) -> None:
    """Results of calls come before what the user says beside them, as the calls wait for them."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts = [block if isinstance(block, str) else _text(block) for block in blocks if _is_text(block)]
    for place, block in enumerate(blocks):
        match block:
            case ToolUseBlock() if message.role != "assistant":
                raise RequestError(f"{at}.content[{place}]: only the assistant uses tools", param=f"{at}.content")
            case ToolResultBlock() if message.role != "user":
                raise RequestError(f"{at}.content[{place}]: only the user has results of tools", param=f"{at}.content")
            case ToolResultBlock():
                turns.result(block.tool_use_id, _result(block))
    match message.role:
        case "assistant":
            if texts or not any(isinstance(block, ToolUseBlock) for block in blocks):
                turns.assistant("\n".join(texts))
            for block in blocks:
                if isinstance(block, ToolUseBlock):
                    turns.call(at, block.id, block.name, json.dumps(block.input, ensure_ascii=False))
        case "system":
            turns.system("\n".join(texts))
        case "user":
            if texts or not any(isinstance(block, ToolResultBlock) for block in blocks):
                turns.user("\n".join(texts))


def _is_text(block: object) -> bool:
    return isinstance(block, str | TextBlock | DocumentBlock)


def _text(block: object) -> str:
    match block:
        case TextBlock(text=text):
            return text
        case DocumentBlock(title=title, context=context):
            return "\n".join(part for part in (title, context, block.source.data) if part)
    raise AssertionError("only what is text is asked for its text")


def _result(block: ToolResultBlock) -> str:
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(_text(part) for part in content)
    return f"Error: {text}" if block.is_error else text


def _tools(body: PromptPart) -> dict[str, Any]:
    """The tools that the model may call, and how it is to choose, as a chat says it."""
    tools = [_tool(tool) for tool in body.tools or () if isinstance(tool, CustomTool)]
    choice = body.tool_choice
    if choice is None:
        return {"tools": tools or None}
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    chosen: NamedTool | str | None
    match choice.type:
        case "tool":
            if choice.name is None:
                raise RequestError("tool_choice of type tool needs a name", param="tool_choice.name")
            function = FunctionName.model_construct(name=choice.name)
            chosen = NamedTool.model_construct(type="function", function=function)
        case "any":
            chosen = "required"
        case _:
            chosen = choice.type if tools else None
    return {"tools": tools or None, "tool_choice": chosen, "parallel_tool_calls": parallel}


def skipped_tools(body: PromptPart) -> list[str]:
    """Where tools stand that Anthropic would run, and their kinds."""
    return [f"tools[{place}]:{tool.type}" for place, tool in enumerate(body.tools or ()) if isinstance(tool, OtherTool)]


def _tool(tool: CustomTool) -> Tool:
    function = FunctionDefinition.model_construct(
        name=tool.name, description=tool.description, parameters=tool.input_schema
    )
    return Tool.model_construct(type="function", function=function)


def _response_format(body: MessagesBody) -> ResponseFormat | None:
    wanted = (body.output_config.format if body.output_config else None) or body.output_format
    if wanted is None:
        return None
    schema = JSONSchemaFormat.model_construct(name="answer", schema=wanted.schema_)
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema)
