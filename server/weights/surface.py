"""A member's view of text: its tokenizer, its chat template, its own system prompt.

The ensemble's *surface* is that of its first member: ids that clients send or receive, stop strings and logit biases
are in its terms.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ensemble_server.ensembles.base import Message
from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises `ModelLoadError` if the folder has none that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as exc:  # tokenizers raise whatever their parts raise
        raise ModelLoadError(f"{folder} has no tokenizer that loads ({type(exc).__name__}: {exc})") from exc


class Surface:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None, system_prompt: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template: str | None = chat_template or tokenizer.chat_template
        self.system_prompt = system_prompt
        if isinstance(self.chat_template, dict):  # several named templates: the one for plain chat is called "default"
            self.chat_template = self.chat_template.get("default")
        if system_prompt and self.chat_template is None:
            raise ModelLoadError("system_prompt needs a chat template, which this model lacks; set chat_template")

    @cached_property
    def token_ids(self) -> Mapping[str, int]:
        """token -> id; two surfaces share a vocabulary if these maps are equal."""
        return self.tokenizer.get_vocab()

    @cached_property
    def vocab_size(self) -> int:
        return max(self.token_ids.values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text: those with a role (end of text), and all that are marked as special."""
        marked = [index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        return frozenset(marked) | frozenset(self.tokenizer.all_special_ids)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @property
    def supports_tools(self) -> bool:
        return self.chat_template is not None and "tools" in self.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`, as a stream of them yields it; bytes that are no UTF-8 become U+FFFD."""
        stream = TextStream(self, skip_special_tokens=skip_special_tokens)
        return "".join([stream.add(token_id) for token_id in token_ids]) + stream.flush()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The conversation as this member reads it. Its own system prompt stands before the client's.

        Raises `UnsupportedError` without a chat template, `RequestError` if the template refuses the messages.
        """
        return self._rendered(
            messages, tools=list(tools) or None, add_generation_prompt=add_generation_prompt, tokenize=True
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
        if self.system_prompt:
            if conversation and conversation[0]["role"] == "system":
                conversation[0]["content"] = f"{self.system_prompt}\n\n{conversation[0]['content']}"
            else:
                conversation.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            return self.tokenizer.apply_chat_template(
                conversation, chat_template=self.chat_template, return_dict=False, **options
            )
        except Exception as exc:  # templates are programs: they raise whatever Jinja and their authors raise
            raise RequestError(f"the chat template refuses these messages: {exc}", param="messages") from exc

    def bytes_of(self, token_id: int, previous: int | None = None) -> bytes:
        """The bytes that a token adds to the text after the token `previous`. Special tokens give their literal text.

        Byte-level and byte-fallback vocabularies have exact bytes; others (WordPiece, WordLevel) decode in context.
        """
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # an id between the vocabulary's tokens that no token has
            return b""
        match self._decoder_kind:
            case "byte_level" | "byte_fallback" if token_id in self._added:
                return self._added[token_id].encode()
            case "byte_level":
                table = self._byte_table
                return bytes(table[char] for char in token) if all(char in table for char in token) else token.encode()
            case "byte_fallback":
                if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                    return bytes([int(token[3:5], 16)])
                return token.replace("▁", " ").encode()
        if previous is None:
            return self.tokenizer.decode([token_id]).encode()
        before = self.tokenizer.decode([previous])
        return self.tokenizer.decode([previous, token_id])[len(before) :].encode()

    def info(self) -> dict[str, Any]:
        """What a remote client needs to use this tokenizer (lm-evaluation-harness asks for these four)."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {name: getattr(self.tokenizer, name) for name in names} | {"chat_template": self.chat_template}

    @cached_property
    def _added(self) -> Mapping[int, str]:
        return {index: token.content for index, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _byte_table(self) -> Mapping[str, int]:
        return {char: byte for byte, char in bytes_to_unicode().items()}

    @cached_property
    def _decoder_kind(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        description = repr(backend.decoder) if backend is not None and backend.decoder is not None else ""
        if "ByteLevel" in description:
            return "byte_level"
        return "byte_fallback" if "ByteFallback" in description or "Metaspace" in description else "other"


def _for_template(message: Message) -> dict[str, Any]:
    """A copy of a message, with tool calls as templates want them: arguments as an object instead of JSON text."""
    copy = dict(message)
    if calls := copy.get("tool_calls"):
        copy["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in calls
        ]
    return copy


class TextStream:
    """Token ids in, whole characters out. Text may lag behind the tokens while a character is incomplete."""

    def __init__(self, surface: Surface, *, skip_special_tokens: bool) -> None:
        self._surface = surface
        self._skipped = surface.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._previous: int | None = None

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._decoder.decode(self._surface.bytes_of(token_id, self._previous))
        self._previous = token_id
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come: the replacement character if a character stayed incomplete."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text at the first stop string, also across the borders of pieces.

    Text that could be the beginning of a stop string is held back until it is clear that it is not.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """-> (text that may be shown, the stop string that was met or None). After a stop there is nothing more."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first: which one that is does not depend on where pieces end
            at, stop = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            self._held = ""
            return text[: at + len(stop) * self._include], stop
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`: ("abc", "cd") -> 1"""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
