"""A checkpoint's tokenizer: which tokens it has, and the text and bytes that each of them stands for.

transformers brings torch with it, so it is imported where a tokenizer is loaded: a config of remote models alone needs
neither.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.lean_transformers import import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises `ModelLoadError` if the folder has none that loads."""
    import_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as exc:  # tokenizers raise whatever their parts raise
        raise ModelLoadError(f"{folder} has no tokenizer that loads ({type(exc).__name__}: {exc})") from exc


# Writing systems of two and three bytes per character: what tokens of words or of whole characters make of them shows
# whether a vocabulary spells any text.
MULTILINGUAL = "The 2nd café: Größe, Ελλάδα, Привет, שלום, العربية, हिन्दी, ไทย, 你好, 日本語, 한국어.\n\tx = f(y);  end"


class Vocabulary:
    """The tokens of a tokenizer, as ids, as text and as bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def token_ids(self) -> Mapping[str, int]:
        """token -> id; two surfaces share a vocabulary if these maps are equal."""
        return self.tokenizer.get_vocab()

    @cached_property
    def vocab_size(self) -> int:
        return max(self.token_ids.values()) + 1

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Tokens beside the trained vocabulary: special ones, and what a fine-tune has added."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text: those with a role (end of text), and all that are marked as special."""
        marked = [index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        return frozenset(marked) | frozenset(self.tokenizer.all_special_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text that begins with the beginning-of-text token, as rendered chats do, does not get a second one."""
        token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        bos = self.tokenizer.bos_token_id
        if add_special_tokens and bos is not None and token_ids[:2] == [bos, bos]:
            del token_ids[0]
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`, as a stream of them yields it; bytes that are no UTF-8 become U+FFFD."""
        stream = TextStream(self, skip_special_tokens=skip_special_tokens)
        return "".join([stream.add(token_id) for token_id in token_ids]) + stream.flush()

    def bytes_of(self, token_id: int, previous: int | None = None) -> bytes:
        """The bytes that a token adds to the text after the token `previous`. Special tokens give their literal text.

        Byte-level and byte-fallback vocabularies have exact bytes; others (WordPiece, WordLevel) decode in context.
        """
        tokenizer: Any = self.tokenizer  # its types leave open what only lists of ids give: lists of texts
        token = tokenizer.convert_ids_to_tokens(token_id)
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
            return tokenizer.decode([token_id]).encode()
        before = tokenizer.decode([previous])
        return tokenizer.decode([previous, token_id])[len(before) :].encode()

    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, b"" for those that stand for none (special tokens, ids that no token has).

        Raises `ModelLoadError` if the tokens are not bytes: a text in many scripts does not survive being encoded.
        """
        texts = [b"" if i in self.special_ids else self.bytes_of(i) for i in range(self.vocab_size)]
        sample = MULTILINGUAL.encode()
        spelled = b"".join(texts[i] for i in self.encode(MULTILINGUAL, add_special_tokens=False))
        # A vocabulary of words may mark where a text begins with a space (SentencePiece's dummy prefix).
        if self._decoder_kind == "other" or spelled.removeprefix(b" ") != sample:
            raise ModelLoadError(
                "its tokens are not bytes (WordPiece, WordLevel, or a vocabulary that lower-cases, normalises or knows "
                f"only some characters): a text in many scripts comes back as {spelled[:60].decode(errors='replace')!r}"
            )
        return texts

    @cached_property
    def _added(self) -> Mapping[int, str]:
        return {index: token.content for index, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _byte_table(self) -> Mapping[str, int]:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {char: byte for byte, char in bytes_to_unicode().items()}

    @cached_property
    def _decoder_kind(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        description = repr(backend.decoder) if backend is not None and backend.decoder is not None else ""
        if "ByteLevel" in description:
            return "byte_level"
        return "byte_fallback" if "ByteFallback" in description or "Metaspace" in description else "other"


class TextStream:
    """Token ids in, whole characters out. Text may lag behind the tokens while a character is incomplete."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool, shown: Sequence[str] = ()) -> None:
        """`shown`: special tokens that are not skipped all the same."""
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        if shown and self._skipped:
            self._skipped -= {vocabulary.token_ids[token] for token in shown if token in vocabulary.token_ids}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._previous: int | None = None

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self.add_bytes(self._vocabulary.bytes_of(token_id, self._previous))
        self._previous = token_id
        return piece

    def add_bytes(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left when no more tokens come: the replacement character if a character stayed incomplete."""
        return self._decoder.decode(b"", final=True)
