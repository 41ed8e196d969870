"""From a body of items to the chat that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.requests.messages import (
    ChatMessage,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    Tool,
)
from ensemble_server.server.requests.openai_responses.body import (
    AllowedTools,
    CallItem,
    CallOutputItem,
    FunctionTool,
    Item,
    ItemReference,
    MessageItem,
    NamedFunction,
    OtherChoice,
    OtherItem,
    OtherTool,
    RefusalPart,
    ResponsesBody,
    TextFormat,
    TextPart,
)
from ensemble_server.server.requests.protocol import (
    ChatBody,
    Controls,
    JSONSchemaFormat,
    ResponseFormat,
    StreamOptions,
)
from ensemble_server.server.requests.turns import Turns

LOGPROBS = "message.output_text.logprobs"

# a chat's parameters -> what they are called here
NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "truncate_prompt_tokens": "truncation",
    "reasoning_effort": "reasoning.effort",
}

_NOT_SERVED = {
    "background": "a response is answered while its client waits; use /v1/batches",
    "conversation": "use previous_response_id",
    "prompt": "prompt templates are OpenAI's own; send instructions and input",
}

FindItem = Callable[[str], Item]  # an item of a stored response by its id; raises `NotFoundError`


@dataclass
class Conversation:
    """`messages` come after what `earlier` responses hold, without instructions. `skipped`: what was not read."""

    messages: list[ChatMessage]
    skipped: list[str] = field(default_factory=list)


def conversation_of(body: ResponsesBody, earlier: Sequence[ChatMessage], find: FindItem) -> Conversation:
    """Raises `RequestError`."""
    for name, reason in _NOT_SERVED.items():
        if getattr(body, name) not in (None, False):
            raise UnsupportedError(f"{name} cannot be honoured: {reason}", param=name)
    turns = Turns()
    turns.extend(earlier)
    skipped: list[str] = []
    if isinstance(body.input, str):
        turns.user(body.input)
    else:
        for place, item in enumerate(body.input):
            if not add_item(turns, item, f"input[{place}]", find):
                assert isinstance(item, OtherItem), "all others are read"
                skipped.append(f"input[{place}]:{item.type}")
    if not turns.messages:
        raise RequestError("input: must hold a message", param="input")
    return Conversation(turns.messages, skipped)


def add_item(turns: Turns, item: Item, at: str, find: FindItem) -> bool:
    """Whether an item, which stands `at` a place of the body, has been read."""
    match item:
        case MessageItem(role="user"):
            turns.user(_text(item.content))
        case MessageItem(role="assistant"):
            turns.assistant(_text(item.content))
        case MessageItem():
            turns.system(_text(item.content))
        case CallItem():
            turns.call(at, item.call_id, item.name, item.arguments)
        case CallOutputItem():
            turns.result(item.call_id, _text(item.output))
        case ItemReference():
            return add_item(turns, find(item.id), at, find)
        case OtherItem():
            return False
    return True


def _text(content: str | list[TextPart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)


def chat_body(body: ResponsesBody, messages: Sequence[ChatMessage]) -> ChatBody:
    """What `body` asks of a chat with these messages, its instructions before them. Not checked again."""
    turns = Turns()
    if body.instructions:
        turns.system(body.instructions)
    turns.extend(messages)
    tools, tool_choice = served_tools(body)
    controls: dict[str, Any] = {name: getattr(body, name) for name in Controls.model_fields} | {"stream": True}
    return ChatBody.model_construct(
        _fields_set=None,
        **controls,
        messages=turns.messages,
        max_completion_tokens=body.max_output_tokens,
        response_format=_response_format(body.text.format if body.text else None),
        logprobs=body.top_logprobs is not None or LOGPROBS in (body.include or ()),
        top_logprobs=body.top_logprobs,
        tools=[_tool(tool) for tool in tools] or None,
        tool_choice=tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        max_reasoning_tokens=body.max_reasoning_tokens,
        truncate_prompt_tokens=-1 if body.truncation == "auto" else None,
        stream_options=StreamOptions(include_usage=True, continuous_usage_stats=True),
    )


def served_tools(body: ResponsesBody) -> tuple[list[FunctionTool], NamedTool | str | None]:
    """The functions among the tools that the model may call, and how it is to choose, as a chat says it."""
    functions = [tool for tool in body.tools or () if isinstance(tool, FunctionTool)]
    match body.tool_choice:
        case None | str() as choice:
            return functions, choice if functions or choice == "required" else None
        case NamedFunction(name=name):
            function = FunctionName.model_construct(name=name)
            return functions, NamedTool.model_construct(type="function", function=function)
        case AllowedTools(mode=mode, tools=allowed):
            names = [tool.get("name") for tool in allowed if tool.get("type") == "function"]
            return [tool for tool in functions if tool.name in names], mode
        case OtherChoice():
            return functions, "auto" if functions else None


def skipped_tools(body: ResponsesBody) -> list[str]:
    """Where tools stand that OpenAI would run, and their kinds."""
    return [f"tools[{place}]:{tool.type}" for place, tool in enumerate(body.tools or ()) if isinstance(tool, OtherTool)]


def _tool(tool: FunctionTool) -> Tool:
    function = FunctionDefinition.model_construct(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool.model_construct(type="function", function=function)


def _response_format(wanted: TextFormat | None) -> ResponseFormat | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ResponseFormat.model_construct(type="json_object")
    if wanted.schema_ is None:
        raise RequestError("text.format: type json_schema needs a schema", param="text.format")
    schema = JSONSchemaFormat.model_construct(name=wanted.name or "answer", schema=wanted.schema_)
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema)
