"""Log-probabilities in OpenAI's two forms: a list of tokens (chat), parallel lists (completions)."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from ensemble_server.ensembles.base import MemberToken, PromptScored, TokenLogprob
from ensemble_server.server.requests.responses import (
    AlternativeObject,
    ChatLogprobs,
    CompletionLogprobs,
    MemberTokenObject,
    PromptLogprob,
    TokenLogprobObject,
)

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for tokens that cannot come: JSON has no minus infinity


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> ChatLogprobs:
    return {"content": [token_object(token) for token in tokens], "refusal": None}


def token_object(token: TokenLogprob) -> TokenLogprobObject:
    """One generated token, with what `explain` added if it did."""
    listed: TokenLogprobObject = {
        **_alternative(token),
        "top_logprobs": [_alternative(alternative) for alternative in token.top],
    }
    if token.members is not None:
        listed["token_id"] = token.token_id
        listed["top_logprobs"] = [_with_id(alternative) for alternative in token.top]
        listed["members"] = {name: _member_view(view) for name, view in token.members.items()}
    if token.entropy is not None:
        listed["entropy"] = token.entropy
    if token.disagreement is not None:
        listed["disagreement"] = token.disagreement
    return listed


def _member_view(view: MemberToken) -> MemberTokenObject:
    shown: MemberTokenObject = {"logprob": finite(view.logprob), "weight": view.weight}
    if view.top:
        shown["top"] = [_with_id(token) for token in view.top]
    return shown


def _with_id(token: TokenLogprob) -> AlternativeObject:
    return {**_alternative(token), "token_id": token.token_id}


def _alternative(token: TokenLogprob) -> AlternativeObject:
    assert token.logprob is not None, "only the first token of a prompt has no log-probability"
    return {"token": token.text, "logprob": finite(token.logprob), "bytes": list(token.bytes)}


class TextOffsets:
    """Where tokens, one after the other, begin in a choice's text, in characters.

    A token that continues a character begins where that character does. `start`: where the first one begins. `hidden`:
    tokens that the text leaves out. `echo`: the text from `start` on, if it is a prompt: special tokens that were added
    to it are not in it, and a SentencePiece tokenizer puts a space before its first word.
    """

    def __init__(self, start: int = 0, *, hidden: frozenset[int] = frozenset(), echo: str | None = None) -> None:
        self._start = start
        self._place = start
        self._hidden = hidden
        self._echo = echo
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, token: TokenLogprob) -> int:
        place = self._place
        piece = token.bytes
        if token.token_id in self._hidden and not (self._echo and self._is_echoed(piece.decode(errors="replace"))):
            return place
        text = self._decoder.decode(piece)
        if self._echo is not None and place == self._start and text[:1] == " " and not self._is_echoed(text):
            text = text[1:]
        self._place += len(text)
        return place

    def _is_echoed(self, text: str) -> bool:
        return self._echo is not None and self._echo.startswith(text, self._place - self._start)


def completion_logprobs(tokens: Sequence[TokenLogprob], offsets: TextOffsets, *, explain: bool) -> CompletionLogprobs:
    """`tokens` as parallel lists; `offsets` goes on behind them."""
    lists: CompletionLogprobs = {
        "tokens": [legacy_text(token) for token in tokens],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [_legacy_top(token) for token in tokens],
        "text_offset": [offsets.next(token) for token in tokens],
    }
    if explain:
        lists["content"] = [token_object(token) for token in tokens if token.logprob is not None]
    return lists


def legacy_text(token: TokenLogprob) -> str:
    r"""The token's text, or "bytes:\xe2\x82" where its bytes are a part of a character, as OpenAI writes it."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _legacy_top(token: TokenLogprob) -> dict[str, float] | None:
    """The alternatives and the token itself. Tokens that look alike are told apart by their ids: none may hide another,
    or the largest value would not be the most likely token's."""
    if token.logprob is None:
        return None
    top = {legacy_text(token): finite(token.logprob)}
    for alternative in token.top:
        if alternative.token_id == token.token_id and alternative.bytes == token.bytes:
            continue
        text = legacy_text(alternative)
        assert alternative.logprob is not None, "only the first token of a prompt has no log-probability"
        top[text if text not in top else f"token_id:{alternative.token_id}"] = finite(alternative.logprob)
    return top


def prompt_logprobs(prompt: PromptScored) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's form: per token of the prompt a map from token id to log-probability, null for the first."""
    return [_prompt_logprob(token) for token in prompt.tokens]


def _prompt_logprob(token: TokenLogprob) -> dict[str, PromptLogprob] | None:
    if token.logprob is None:
        return None
    ranked: dict[str, PromptLogprob] = {
        str(alternative.token_id): {
            "logprob": finite(alternative.logprob),
            "rank": rank,
            "decoded_token": alternative.text,
        }
        for rank, alternative in enumerate(token.top, start=1)
        if alternative.logprob is not None
    }
    own: PromptLogprob = {"logprob": finite(token.logprob), "rank": None, "decoded_token": token.text}
    return {str(token.token_id): own} | ranked
