"""How alike texts are: cosine of embeddings, and ROUGE-L over words or characters.

    ROUGE-L (Lin 2004), i as the prediction and j as the reference, LCS the longest common subsequence of their tokens:
    P = LCS(i, j) / |i|        R = LCS(i, j) / |j|        F = 2 P R / (P + R)

All matrices are (n, n), float64, row = prediction, column = reference. Equal texts have equal rows, to the last bit.

Tokens, after Unicode's NFKC and lower-casing:
- `rouge_l_word`: runs of letters, marks and digits, so that English gives what the `rouge-score` package gives (its
  stemmer off) and other alphabets keep their words, which that package deletes. In scripts written without spaces
  (Chinese, Japanese kana, Thai, Lao, Khmer, Burmese) each character is a word. A text without any of these (emoji,
  punctuation) is cut into its visible characters, so that "👍" and "👍" agree.
- `rouge_l_char`: the characters, white space as one blank.

A text that has no tokens (empty, or blank) is like no other text and not like itself: its row and column are 0.

The LCS is bit-parallel, from rapidfuzz. References: https://aclanthology.org/W04-1013/ (ROUGE),
https://arxiv.org/abs/1908.10084 (sentence embeddings).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BeforeValidator, Field
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

SimilarityName = Literal[
    "embedding",
    "rouge_l_word",
    "rouge_l_word_precision",
    "rouge_l_word_recall",
    "rouge_l_char",
    "rouge_l_char_precision",
    "rouge_l_char_recall",
]
SIMILARITIES: tuple[SimilarityName, ...] = get_args(SimilarityName)
Measure = Literal["f", "precision", "recall"]
Blend = Mapping[SimilarityName, float] | Mapping[str, float]


def _names_to_blend(value: Any) -> Any:
    """ "embedding" -> {"embedding": 1.0}; a list gives each of its names the weight 1."""
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value, 1.0)
    return value


_Blend = dict[SimilarityName, Annotated[float, Field(gt=0, le=1e6)]]
SimilarityBlend = Annotated[
    _Blend,
    Field(min_length=1),
    BeforeValidator(
        _names_to_blend,
        json_schema_input_type=SimilarityName
        | Annotated[list[SimilarityName], Field(min_length=1)]
        | Annotated[_Blend, Field(min_length=1)],
    ),
]


def blend(matrices: Mapping[str, np.ndarray], weights: Blend) -> np.ndarray:
    """The weighted sum of matrices of one shape; weights are used as they are, not normalised."""
    return reduce(np.add, (weight * matrices[name] for name, weight in weights.items()))


def cosine_similarity(texts: Sequence[str], vectors: np.ndarray) -> np.ndarray:
    """vectors: (n, dim), unit rows, one for each text. Blank texts and vectors of NaN have rows and columns of 0."""
    distinct, place = _distinct(texts)
    of_distinct = np.zeros((len(distinct), vectors.shape[1]), dtype=np.float64)
    of_distinct[place] = vectors
    is_blank = np.array([not text.strip() for text in distinct], dtype=bool)
    of_distinct[is_blank | ~np.isfinite(of_distinct).all(axis=1)] = 0.0
    return (of_distinct @ of_distinct.T)[np.ix_(place, place)]


def rouge_l(name: str, texts: Sequence[str]) -> np.ndarray:
    """The ROUGE-L matrix of `name`, any of SIMILARITIES but "embedding"."""
    _, _, rest = name.partition("rouge_l_")
    unit, _, kind = rest.partition("_")
    tokenize: Callable[[str], Sequence[str]] = {"word": words, "char": characters}[unit]
    measures: dict[str, Measure] = {"": "f", "precision": "precision", "recall": "recall"}
    distinct, place = _distinct(texts)
    matrix = _rouge_l_of_tokens([tokenize(text) for text in distinct], measures[kind])
    return matrix[np.ix_(place, place)]


def _distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """["b", "a", "b"] -> (["b", "a"], [0, 1, 0])"""
    place = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return list(place), [place[text] for text in texts]


def _rouge_l_of_tokens(sequences: Sequence[Sequence[str]], measure: Measure) -> np.ndarray:
    # One character per distinct token turns each sequence into a string, the fastest form for the library.
    code_of = {token: chr(code) for code, token in enumerate(dict.fromkeys(t for tokens in sequences for t in tokens))}
    strings = ["".join(code_of[token] for token in tokens) for tokens in sequences]
    lcs = cdist(strings, strings, scorer=LCSseq.similarity, dtype=np.int64).astype(np.float64)
    lengths = np.maximum([len(string) for string in strings], 1).astype(np.float64)  # LCS is 0 where the length is
    precision, recall = lcs / lengths[:, None], lcs / lengths[None, :]
    if measure == "precision":
        return precision
    if measure == "recall":
        return recall
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)


def words(text: str) -> list[str]:
    """ "Don't stop, 你好!" -> ["don", "t", "stop", "你", "好"]"""
    text = unicodedata.normalize("NFKC", text).lower()
    return text.translate(_SPACING).split() or [char for char in text if not char.isspace()]


def characters(text: str) -> str:
    """ "Hello \\n World" -> "hello world" """
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


_UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR")
_ZERO_WIDTH_SPACE = 0x200B


class _Spacing(dict[int, str]):
    """A table for `str.translate`, filled as characters are met: what each becomes so that words can be split."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category == "Cf" and code != _ZERO_WIDTH_SPACE:
            spaced = ""  # joiners, direction marks and soft hyphens are part of a word but not of its spelling
        elif not char.isalnum() and category[0] != "M":
            spaced = " "
        elif unicodedata.name(char, "").startswith(_UNSPACED_SCRIPTS):
            spaced = f" {char} "
        else:
            spaced = char
        self[code] = spaced
        return spaced


_SPACING = _Spacing()
