"""The table of formats: who reads a call, how one is written, and what in a chat template gives the format away.

hermes        <tool_call>{"name": ..., "arguments": {...}}</tool_call>                       Hermes, Qwen 2.5 and 3
qwen3_coder   <tool_call><function=name><parameter=key>value</parameter>...                  Qwen3-Coder
glm           <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...           GLM-4.5 and later
llama3_json   {"name": ..., "parameters": {...}}                                             Llama 3.1 and later
mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}}] or [TOOL_CALLS]name[ARGS]{...} Mistral
deepseek      <｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>, and V3.2's     DeepSeek V3, R1
gemma         <|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>                          Gemma 4, FunctionGemma
phi           <|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>                 Phi-4-mini
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ensemble_server.ensembles.base import ToolCall
from ensemble_server.server.tool_formats import deepseek, gemma, json_calls, tagged_calls
from ensemble_server.server.tool_formats.reader import MarkedReader

ToolFormatName = Literal["hermes", "qwen3_coder", "glm", "llama3_json", "mistral", "deepseek", "gemma", "phi"]


@dataclass(frozen=True)
class ToolFormat:
    """`written`: calls as the model writes them. `signs`: a template that has all texts of one of these teaches the
    format."""

    reader: type[MarkedReader]
    written: Callable[[Sequence[ToolCall]], str]
    signs: tuple[tuple[str, ...], ...]


# A template is looked at for these in this order: the tags of Hermes stand in templates of others, too.
FORMATS: Mapping[ToolFormatName, ToolFormat] = {
    "deepseek": ToolFormat(deepseek.DeepSeekReader, deepseek.deepseek, (("<｜tool▁call▁begin｜>",), ("｜DSML｜",))),
    "gemma": ToolFormat(gemma.GemmaReader, gemma.gemma, (("<|tool_call>",), ("<start_function_call>",))),
    "qwen3_coder": ToolFormat(
        tagged_calls.Qwen3CoderReader, tagged_calls.qwen3_coder, (("<tool_call>", "<function="),)
    ),
    "glm": ToolFormat(tagged_calls.GlmReader, tagged_calls.glm, (("<tool_call>", "<arg_key>"),)),
    "hermes": ToolFormat(json_calls.HermesReader, json_calls.hermes, (("<tool_call>",),)),
    "mistral": ToolFormat(json_calls.MistralReader, json_calls.mistral, (("[TOOL_CALLS]",),)),
    "phi": ToolFormat(json_calls.PhiReader, json_calls.phi, (("<|tool_call|>",), ("<|tool|>",))),
    "llama3_json": ToolFormat(json_calls.BareReader, json_calls.bare, (("<|start_header_id|>", '"parameters"'),)),
}


def format_in(chat_template: str) -> ToolFormatName | None:
    """The format that a chat template teaches; None if it is none of those known here."""
    for name, form in FORMATS.items():
        if any(all(text in chat_template for text in texts) for texts in form.signs):
            return name
    return None
