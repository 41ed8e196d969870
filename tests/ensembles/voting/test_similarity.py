from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from rouge_score.rouge_scorer import RougeScorer

from ensemble_server.ensembles.voting.similarity import (
    SIMILARITIES,
    SimilarityBlend,
    blend,
    characters,
    cosine_similarity,
    rouge_l,
    words,
)

ROUGE_NAMES = [name for name in SIMILARITIES if name != "embedding"]
# ASCII with a letter in it: what the package's tokenizer was made for
ENGLISH = st.text(string.ascii_letters[:8] + string.digits[:3] + " .,'-_\n\t!", max_size=60).map(
    lambda text: f"{text} a"
)
TEXTS = st.lists(st.text(max_size=40), min_size=1, max_size=5)
PACKAGE = RougeScorer(["rougeL"], use_stemmer=False)


@given(st.lists(ENGLISH, min_size=1, max_size=4))
def test_words_equal_the_rouge_score_package_to_the_last_bit(texts: list[str]) -> None:
    for name, attribute in (
        ("rouge_l_word", "fmeasure"),
        ("rouge_l_word_precision", "precision"),
        ("rouge_l_word_recall", "recall"),
    ):
        matrix = rouge_l(name, texts)
        for i, prediction in enumerate(texts):
            for j, reference in enumerate(texts):
                assert matrix[i, j] == getattr(PACKAGE.score(reference, prediction)["rougeL"], attribute)


def test_words_equal_the_rouge_score_package_on_prose() -> None:
    texts = [
        "It's a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.",
        "A man with a fortune -- e.g. $10,000 a year -- needs no wife; so it's acknowledged.",
        "Mr_Bennet replied: 'No.'\n\nChapter 2\tbegins HERE.",
    ]
    matrix = rouge_l("rouge_l_word", texts)
    expected = [[PACKAGE.score(j, i)["rougeL"].fmeasure for j in texts] for i in texts]
    assert matrix.tolist() == expected


def lcs_length(left: str, right: str) -> int:
    """The textbook's table."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(TEXTS)
def test_characters_equal_the_textbooks_table(texts: list[str]) -> None:
    precision = rouge_l("rouge_l_char_precision", texts)
    recall = rouge_l("rouge_l_char_recall", texts)
    f = rouge_l("rouge_l_char", texts)
    for i, left in enumerate(map(characters, texts)):
        for j, right in enumerate(map(characters, texts)):
            lcs = lcs_length(left, right)
            assert precision[i, j] == (lcs / len(left) if left else 0)
            assert recall[i, j] == (lcs / len(right) if right else 0)
            assert f[i, j] == pytest.approx(2 * lcs / (len(left) + len(right)) if lcs else 0)


@pytest.mark.parametrize("name", ROUGE_NAMES)
@given(texts=TEXTS)
@settings(max_examples=50)
def test_matrices_are_finite_bounded_and_one_for_equal_texts(name: str, texts: list[str]) -> None:
    texts = [*texts, texts[0]]
    matrix = rouge_l(name, texts)
    assert matrix.shape == (len(texts), len(texts))
    assert matrix.dtype == np.float64
    assert np.isfinite(matrix).all()
    assert ((matrix >= 0) & (matrix <= 1)).all()
    assert (matrix[0] == matrix[-1]).all()
    for index, text in enumerate(texts):
        assert matrix[index, index] == (1 if characters(text) and words(text) else 0)


@given(TEXTS)
def test_precision_is_recall_with_the_roles_changed(texts: list[str]) -> None:
    assert (rouge_l("rouge_l_word_precision", texts) == rouge_l("rouge_l_word_recall", texts).T).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop_now 3.5", ["don", "t", "stop", "now", "3", "5"]),
        ("你好,世界", ["你", "好", "世", "界"]),
        ("GPT模型v2", ["gpt", "模", "型", "v2"]),
        ("カタカナ", ["カ", "タ", "カ", "ナ"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("\u200fשלום\u200e עולם", ["שלום", "עולם"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("Привет, МИР", ["привет", "мир"]),
        ("café cafe\u0301", ["café", "café"]),
        ("ＡＢＣ　１２", ["abc", "12"]),
        ("👍 yes 👍", ["yes"]),
        ("👍🎉", ["👍", "🎉"]),
        ("?!", ["?", "!"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_words_of_every_script(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_chinese_that_the_package_deletes_is_compared() -> None:
    texts = ["我喜欢猫", "我喜欢狗", "天气很好"]
    assert PACKAGE.score(texts[0], texts[0])["rougeL"].fmeasure == 0
    matrix = rouge_l("rouge_l_word", texts)
    assert matrix[0].tolist() == [1, 0.75, 0]


def test_blank_texts_are_like_nothing_not_even_themselves() -> None:
    for name in ROUGE_NAMES:
        assert rouge_l(name, ["", " ", "a", ""])[[0, 1, 3]].sum() == 0
    vectors = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    assert cosine_similarity(["", "a", "b"], vectors).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_vectors_that_are_not_numbers_poison_nothing() -> None:
    vectors = np.array([[1, 0], [np.nan, np.nan], [0.6, 0.8]], dtype=np.float32)
    matrix = cosine_similarity(["a", "b", "c"], vectors)
    assert matrix == pytest.approx(np.array([[1, 0, 0.6], [0, 0, 0], [0.6, 0, 1]]))


def test_equal_texts_have_equal_cosines_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    place = [0, 1, 0, 2, 3, 0, 1]
    matrix = cosine_similarity([f"text {index}" for index in place], vectors[place])
    assert matrix.dtype == np.float64
    assert (matrix[0] == matrix[2]).all()
    assert (matrix[0] == matrix[5]).all()
    assert matrix == pytest.approx(vectors[place].astype(np.float64) @ vectors[place].T.astype(np.float64))


def test_half_a_surrogate_pair_is_a_character_like_others() -> None:
    assert rouge_l("rouge_l_char", ["\ud83da", "\ud83da", "a"])[0] == pytest.approx([1, 1, 2 / 3])
    assert rouge_l("rouge_l_word", ["\ud83da", "a"])[0].tolist() == [1, 1]


def test_blend_is_a_weighted_sum() -> None:
    matrices = {"embedding": np.full((2, 2), 0.5), "rouge_l_char": np.eye(2)}
    assert blend(matrices, {"embedding": 2.0, "rouge_l_char": 0.5}).tolist() == [[1.5, 1.0], [1.0, 1.5]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("embedding", {"embedding": 1.0}),
        (["embedding", "rouge_l_char"], {"embedding": 1.0, "rouge_l_char": 1.0}),
        ({"rouge_l_word_recall": 0.5}, {"rouge_l_word_recall": 0.5}),
    ],
)
def test_blend_is_a_name_a_list_or_a_map(value: object, expected: dict[str, float]) -> None:
    assert TypeAdapter(SimilarityBlend).validate_python(value) == expected


@pytest.mark.parametrize("value", [[], {}, {"embedding": -1}, {"embedding": float("nan")}, ["bleu"], 3, [3]])
def test_wrong_blends_are_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(SimilarityBlend).validate_python(value)
