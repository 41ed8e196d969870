"""Structured output: which tokens may come next so that the text matches a grammar. llguidance does the parsing.

The mask falls on the mixture, in the surface vocabulary, so it holds for any number of members. A grammar is compiled
once per tokenizer, off the event loop and off the engine's thread; each choice has a copy of what came out.
"""

from __future__ import annotations

import threading
from functools import cache, lru_cache

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from ensemble_server.ensembles.base import Grammar
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.engines.shared.grammar_checks import problem_of, size_problem_of, source_of

_LIMITS = LLParserLimits(verbose_errors=False)
_building = threading.Lock()  # of the tables of a tokenizer: two requests must not build the same ones


class CompiledGrammar:
    """A grammar over the tokens of one vocabulary. May be used from several threads."""

    def __init__(self, grammar: Grammar, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self._kind = grammar.kind
        self._vocab_size = vocab_size
        try:
            source = source_of(grammar)
        except ValueError as exc:
            raise _refusal(grammar, str(exc)) from exc
        self._matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
        if self._matcher.is_error():
            raise _refusal(grammar, _words(self._matcher.get_error()))

    def new_mask(self) -> GrammarMask:
        return GrammarMask(self._matcher.deep_copy(), self._kind, self._vocab_size)


class GrammarMask:
    """The state of one choice's grammar. Not shared between choices."""

    def __init__(self, matcher: LLMatcher, kind: str, vocab_size: int) -> None:
        self._matcher = matcher
        self._kind = kind
        self._vocab_size = vocab_size

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._matcher.is_stopped()

    def copy(self) -> GrammarMask:
        return GrammarMask(self._matcher.deep_copy(), self._kind, self._vocab_size)

    def allowed(self) -> torch.Tensor:
        """(vocab_size,) bool: the tokens that keep the text on a path to a match. Raises as `advance` does."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self._give_up()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))

    def advance(self, token_id: int) -> None:
        """Raises `UnsupportedError` if the grammar grew too complex to go on, `RuntimeError` if the token was not
        allowed."""
        if not self._matcher.consume_token(token_id):
            self._give_up()

    def _give_up(self) -> None:
        error = _words(self._matcher.get_error())
        if "doesn't satisfy the grammar" in error:
            raise RuntimeError(f"the grammar cannot go on: {error}")
        raise UnsupportedError(
            f"the {self._kind} grew too complex while it was followed ({error}); make it smaller",
            param="response_format",
        )


def check(grammar: Grammar) -> None:
    """Raise `RequestError` naming what is wrong with a grammar, without needing a tokenizer."""
    if problem := problem_of(grammar):
        raise _refusal(grammar, problem)


@lru_cache(maxsize=16)
def compiled(
    grammar: Grammar, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: frozenset[int]
) -> CompiledGrammar:
    """`eos_ids`: each of them may end a complete text. The last few are kept. Blocks, up to seconds for large ones.

    Raises `RequestError` for a grammar that cannot be compiled, `UnsupportedError` for a tokenizer that is slow or
    whose tokens are not bytes.
    """
    if problem := size_problem_of(grammar):
        raise _refusal(grammar, problem)
    return CompiledGrammar(grammar, prepared(tokenizer, vocab_size, eos_ids), vocab_size)


@lru_cache(maxsize=16)
def compiled_by_bytes(grammar: Grammar) -> CompiledGrammar:
    """`compiled` for text that is written by bytes, whatever the vocabularies: see `byte_row`."""
    if problem := size_problem_of(grammar):
        raise _refusal(grammar, problem)
    tokenizer = _byte_tokenizer()
    return CompiledGrammar(grammar, tokenizer, tokenizer.vocab_size)


def byte_row(allowed: torch.Tensor) -> np.ndarray:
    """(257,) bool: what a mask of `compiled_by_bytes` allows of the 256 bytes, and whether the text may end."""
    bits = allowed.numpy()
    return np.append(bits[:256], bits[_byte_tokenizer().eos_token])


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


def prepared(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: frozenset[int]) -> LLTokenizer:
    """The tables of a tokenizer. Building them takes about a second for a vocabulary of 49k, so they are kept; all
    views of a model share them. Raises `UnsupportedError`."""
    with _building:
        return _prepared(tokenizer, vocab_size, eos_ids)


@lru_cache(maxsize=16)
def _prepared(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: frozenset[int]) -> LLTokenizer:
    eos = sorted(eos_id for eos_id in eos_ids if eos_id < vocab_size)
    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos or None)  # pyright: ignore[reportArgumentType]
    except ValueError as exc:
        raise UnsupportedError(
            f"structured output needs a fast tokenizer with byte-level tokens: {exc}", param="response_format"
        ) from exc


def _refusal(grammar: Grammar, problem: str) -> RequestError:
    return RequestError(f"the {grammar.kind} is not valid: {problem}", param="response_format")


def _words(error: str) -> str:
    """Without what llguidance says of its own state."""
    return error.partition("\n<")[0]
