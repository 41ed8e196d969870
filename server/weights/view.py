"""A member's view of text: its tokenizer, its chat template, its own system prompt.

The ensemble's *surface* is that of its first member: ids that clients send or receive, stop strings and logit biases
are in its terms.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from ensemble_server.ensembles.base import Message, ToolCall
from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.surrogates import loads
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.tool_formats.formats import FORMATS, ToolFormat, ToolFormatName, format_in
from ensemble_server.server.weights.thinking import Markers, markers_in, settings_in
from ensemble_server.server.weights.tokenizer import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOOLS_IN_MESSAGE = re.compile(r"message(?:\.tools|\[.tools.\])")  # Phi's templates want them there
_MARK = "f3b1c2"  # a text that no template has of its own


@cache
def _told_by_us() -> frozenset[str]:
    """What transformers' renderer is told by us: the template itself, for one."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


class Surface(Vocabulary):
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        thinking: Markers | Literal["auto", "off"] = "auto",
        tool_format: ToolFormatName | Literal["auto", "off"] = "auto",
    ) -> None:
        super().__init__(tokenizer)
        own: Any = tokenizer.chat_template
        if isinstance(own, dict):  # several named templates: the one for plain chat is called "default"
            own = own.get("default")
        self.chat_template: str | None = chat_template or own
        self.system_prompt = system_prompt
        self.template_kwargs = dict(template_kwargs or {})
        if reserved := sorted(_told_by_us() & self.template_kwargs.keys()):
            raise ModelLoadError(f"chat_template_kwargs: {reserved[0]!r} is set by the server; leave it out")
        self.thinking: Markers | None = None
        if thinking != "off":
            self.thinking = markers_in(self.chat_template) if thinking == "auto" else thinking
        self._tool_format: ToolFormatName | Literal["auto", "off"] = tool_format
        if system_prompt and self.chat_template is None:
            raise ModelLoadError("system_prompt needs a chat template, which this model lacks; set chat_template")

    @cached_property
    def template_problem(self) -> str | None:
        """What is wrong with the chat template, found on one plain question; None if all is well or there is none."""
        if self.chat_template is None:
            return None
        try:
            text = self._text_of([{"role": "user", "content": _MARK}])
        except Exception as exc:  # templates are programs: they raise whatever Jinja and their authors raise
            return f"cannot render a plain question ({type(exc).__name__}: {exc})"
        return None if _MARK in text else "leaves out what the user says"

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template shows system messages. Some families refuse them, some drop them without a word."""
        try:
            text = self._text_of([{"role": "system", "content": _MARK}, {"role": "user", "content": "?"}])
        except Exception:  # as above
            return False
        return _MARK in text

    @cached_property
    def has_late_system_role(self) -> bool:
        """Whether the template shows system messages that come after others. Coding agents send such."""
        return self._shows_after_question("system")

    @cached_property
    def takes_users_in_a_row(self) -> bool:
        """Whether the template shows a user's message behind another one. Some families want answers between."""
        return self._shows_after_question("user")

    def _shows_after_question(self, role: str) -> bool:
        try:
            text = self._text_of([{"role": "user", "content": "?"}, {"role": role, "content": _MARK}])
        except Exception:  # as above
            return False
        return _MARK in text

    @cached_property
    def call_id_length(self) -> int | None:
        """How many letters and digits the template wants in the id of a tool call (Mistral's wants 9); None for any."""
        for length in (None, 9):
            call_id = _short_id("x", length) if length else "call_0123456789abcdef01234567"
            call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {}}}
            try:
                self._text_of(
                    [
                        {"role": "user", "content": "?"},
                        {"role": "assistant", "content": "", "tool_calls": [call]},
                        {"role": "tool", "tool_call_id": call_id, "name": "f", "content": "!"},
                    ]
                )
            except Exception:  # as above
                continue
            return length
        return None

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @cached_property
    def thought_settings(self) -> frozenset[str]:
        """What the template asks about how much to think: a level, a switch."""
        return settings_in(self.chat_template)

    @property
    def supports_tools(self) -> bool:
        return self.chat_template is not None and "tools" in self.chat_template

    @property
    def tool_format(self) -> ToolFormatName | None:
        """How the model writes tool calls; None if that is not known."""
        form = self._tool_format
        if self.chat_template is None or form == "off":
            return None
        return format_in(self.chat_template) if form == "auto" else form

    def own_ids(self, token_ids: Sequence[int]) -> list[int]:
        """`token_ids` of the ensemble as this member reads them: all are its own."""
        return list(token_ids)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation as this member reads it. Its own system prompt stands before the client's. Where the
        template has no system role, what system messages say stands at the head of the next user message.

        `template_kwargs`: what else the template is told, before what the config tells it.
        Raises `UnsupportedError` without a chat template, `RequestError` if the template refuses the messages.
        """
        if reserved := sorted(_told_by_us().intersection(template_kwargs or {})):
            raise RequestError(
                f"chat_template_kwargs: {reserved[0]!r} is not the request's to say; it takes what the template itself "
                "asks for, such as enable_thinking",
                param="chat_template_kwargs",
            )
        return self._rendered(
            messages,
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            **(template_kwargs or {}),
        )

    def render_text(self, messages: Sequence[Message]) -> str:
        """The text whose encoding without special tokens is `render(messages)`."""
        return self._rendered(messages, add_generation_prompt=True, tokenize=False)

    def _rendered(self, messages: Sequence[Message], **options: Any) -> Any:
        if self.chat_template is None:
            raise UnsupportedError(
                "this model has no chat template; use /v1/completions, or set chat_template in the config",
                param="messages",
            )
        conversation = [_for_template(message) for message in messages]
        tools = options.get("tools")
        if not self.supports_tools and "tool_calls" not in self.chat_template:
            form = FORMATS[self.tool_format or "hermes"]
            conversation = _without_tool_messages(conversation, form)
            if tools and self.tool_format is not None:
                _put_before(conversation, _about_tools(tools, form))
        if self.system_prompt:
            _put_before(conversation, self.system_prompt)
        if tools and _TOOLS_IN_MESSAGE.search(self.chat_template):
            _put_before(conversation, "")
            conversation[0]["tools"] = json.dumps(tools, ensure_ascii=False)
        if any("tool_calls" in message for message in conversation) and (length := self.call_id_length):
            _shorten_call_ids(conversation, length)
        if any(message["role"] == "system" for message in conversation[1:]) and not self.has_late_system_role:
            conversation = _without_late_system_role(conversation)
        if any(message["role"] == "system" for message in conversation) and not self.has_system_role:
            conversation = _without_system_role(conversation)
        if not self.takes_users_in_a_row:
            conversation = _one_user_at_a_time(conversation)
        try:
            return self._apply_template(conversation, **options)
        except Exception as exc:  # as above
            raise RequestError(f"the chat template refuses these messages: {exc}", param="messages") from exc

    def _text_of(self, conversation: list[dict[str, Any]]) -> str:
        return self._apply_template(conversation, add_generation_prompt=True, tokenize=False)

    def _apply_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=self.chat_template, return_dict=False, **{**self.template_kwargs, **options}
        )

    def info(self) -> dict[str, Any]:
        """What a remote client needs to use this tokenizer (lm-evaluation-harness asks for these four)."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {name: getattr(self.tokenizer, name) for name in names} | {"chat_template": self.chat_template}


def _thinking(model: HostedModel) -> Markers | Literal["auto", "off"]:
    given = model.reasoning
    return given if isinstance(given, str) else Markers(given.start, given.end)


def member_surface(name: str, models: Mapping[str, HostedModel], tokenizer: PreTrainedTokenizerBase) -> Surface:
    """How member `name` sees text, with the tokenizer of the weights that it stands on.

    Raises `ModelLoadError` for a template of the config that cannot render a plain question. The tokenizer's own is
    only warned about: raw completions do without it.
    """
    model = models[name]
    parent = model if model.base is None else models[model.base]
    chat_template = model.chat_template or parent.chat_template
    try:
        surface = Surface(
            tokenizer,
            chat_template=chat_template,
            system_prompt=model.system_prompt if model.system_prompt is not None else parent.system_prompt,
            template_kwargs={**parent.chat_template_kwargs, **model.chat_template_kwargs},
            thinking=_thinking(model if "reasoning" in model.model_fields_set else parent),
            tool_format=(model if "tool_format" in model.model_fields_set else parent).tool_format,
        )
    except ModelLoadError as exc:
        raise ModelLoadError(f"model {name!r}: {exc}") from exc
    if (problem := surface.template_problem) is not None:
        if chat_template is not None or surface.system_prompt:
            raise ModelLoadError(f"model {name!r}: its chat_template {problem}; correct it, or leave it out")
        logger.warning("model %r: the chat template of its tokenizer %s; set chat_template", name, problem)
    return surface


def _for_template(message: Message) -> dict[str, Any]:
    """A copy of a message, with tool calls as templates want them: arguments as an object instead of JSON text."""
    copy = dict(message)
    if calls := copy.get("tool_calls"):
        copy["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": loads(call["function"]["arguments"])}}
            for call in calls
        ]
    return copy


def _put_before(conversation: list[dict[str, Any]], text: str) -> None:
    """`text` as the beginning of what the system says."""
    if not conversation or conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": text})
    elif text:
        conversation[0]["content"] = f"{text}\n\n{conversation[0]['content']}"


def _about_tools(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    """What a model is told whose template knows no tools."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = form.written([ToolCall("function_name", '{"argument": "value"}')])
    return (
        f"You can call these functions, each described by a line of JSON:\n{functions}\n\nTo call one, write\n{example}"
        "\nand nothing behind it. You will then be told what it returns."
    )


def _without_tool_messages(conversation: Sequence[dict[str, Any]], form: ToolFormat) -> list[dict[str, Any]]:
    """Calls as the model would write them, and what they returned as a message of the user's."""
    plain: list[dict[str, Any]] = []
    has_returned = False
    for message in conversation:
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            written = form.written(
                [ToolCall(function["name"], json.dumps(function["arguments"])) for function in functions]
            )
            content = f"{message['content']}\n{written}" if message.get("content") else written
            message = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
        is_return = message["role"] == "tool"
        if is_return:
            returned = f"<tool_response>\n{message['content']}\n</tool_response>"
            if has_returned:
                plain[-1]["content"] += f"\n{returned}"
                continue
            message = {"role": "user", "content": returned}
        has_returned = is_return
        plain.append(message)
    return plain


def _shorten_call_ids(conversation: Sequence[dict[str, Any]], length: int) -> None:
    """Ids are names that a conversation agrees on, so another form of them says the same."""
    for message in conversation:
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": _short_id(call["id"], length)} for call in calls]
        if "tool_call_id" in message:
            message["tool_call_id"] = _short_id(message["tool_call_id"], length)


def _short_id(call_id: str, length: int) -> str:
    """`call_id` if it is that many letters and digits already, else what always stands for it."""
    if len(call_id) == length and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:length]


def _without_late_system_role(conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the system says after the beginning joins the user's message before it, or becomes one:
    [system a, user b, system c, assistant d] -> [system a, user "b\\n\\nc", assistant d]"""
    merged = list(conversation[:1])
    for message in conversation[1:]:
        if message["role"] == "system":
            message = {"role": "user", "content": message["content"]}
            if merged[-1]["role"] == "user":
                message = _joined(merged.pop(), message)
        merged.append(message)
    return merged


def _one_user_at_a_time(conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """[user a, user b, assistant c] -> [user "a\\n\\nb", assistant c]"""
    merged: list[dict[str, Any]] = []
    for message in conversation:
        if merged and merged[-1]["role"] == message["role"] == "user":
            message = _joined(merged.pop(), message)
        merged.append(message)
    return merged


def _joined(message: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": f"{message['content'] or ''}\n\n{more['content'] or ''}"}


def _without_system_role(conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """[system a, user b, assistant c] -> [user "a\\n\\nb", assistant c]; what no user message follows becomes one."""
    merged: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in conversation:
        if message["role"] == "system":
            waiting.append(message["content"] or "")
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": "\n\n".join([*waiting, message["content"] or ""])}
            waiting = []
        merged.append(message)
    if waiting:
        merged.append({"role": "user", "content": "\n\n".join(waiting)})
    return merged
