"""Structured output: which tokens may come next so that the text matches a grammar. llguidance does the parsing.

The mask falls on the mixture, in the surface vocabulary, so it holds for any number of members.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from ensemble_server.ensembles.base import Grammar
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.weights.view import Surface

_ANY_JSON_OBJECT = json.dumps({"type": "object"})


class GrammarMask:
    """The state of one choice's grammar. Not shared between choices."""

    def __init__(self, grammar: Grammar, surface: Surface, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """`eos_ids`: each of them may end a complete text.

        Raises `RequestError` for a grammar that cannot be compiled, `UnsupportedError` for a tokenizer that is slow or
        whose tokens are not bytes.
        """
        self._vocab_size = vocab_size
        self._matcher = LLMatcher(_tokenizer(surface.tokenizer, vocab_size, eos_ids), _compile(grammar))
        if self._matcher.is_error():
            error = _without_state(self._matcher.get_error())
            raise RequestError(f"the {grammar.kind} is not valid: {error}", param="response_format")

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        """(vocab_size,) bool: the tokens that keep the text on a path to a match."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))

    def advance(self, token_id: int) -> None:
        """Raises `RuntimeError` if the token was not allowed, or the grammar grew too complex to go on."""
        if not self._matcher.consume_token(token_id):
            raise RuntimeError(f"the grammar cannot go on: {_without_state(self._matcher.get_error())}")


def check(grammar: Grammar) -> None:
    """Raise `RequestError` naming what is wrong with a grammar, without needing a tokenizer."""
    if error := LLMatcher.validate_grammar(_compile(grammar)):
        raise RequestError(f"the {grammar.kind} is not valid: {error}", param="response_format")


def _compile(grammar: Grammar) -> str:
    match grammar.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "json_object":
            return LLMatcher.grammar_from_json_schema(_ANY_JSON_OBJECT)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.source)


def _without_state(error: str) -> str:
    """Without the parser's state, which llguidance appends."""
    return error.partition("\n<state>")[0]


@lru_cache(maxsize=16)
def _tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: frozenset[int]) -> LLTokenizer:
    """Building it takes about a second for a vocabulary of 49k, so it is kept; all views of a model share it."""
    eos = sorted(eos_id for eos_id in eos_ids if eos_id < vocab_size)
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos or None)
    except ValueError as exc:
        raise UnsupportedError(
            f"structured output needs a fast tokenizer with byte-level tokens: {exc}", param="response_format"
        ) from exc
