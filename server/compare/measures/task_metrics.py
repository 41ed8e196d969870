"""One output judged against the references of its item: what was answered, and a score from 0 to 1.

    exact_match              the answer's canonical text equals that of a reference
    number, choice, yes_no   the answer that is found in the output equals the one found in a reference
    rouge_l                  ROUGE-L F over words against the closest reference (`ensembles.voting.similarity`)
    chrf                     chrF2 of the sentence against the references, over 100 (sacrebleu)

Answers are found as votes find them (`ensembles.voting.answer_extraction`). An output in which nothing is found has the
answer None and scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.ensembles.voting.similarity import rouge_l

GenerationMetric = Literal["exact_match", "number", "choice", "yes_no", "rouge_l", "chrf"]

_ANSWER_KINDS: dict[GenerationMetric, AnswerKind] = {
    "exact_match": "text",
    "number": "number",
    "choice": "choice",
    "yes_no": "yes_no",
}


def judge(metric: GenerationMetric, output: str, references: Sequence[str]) -> tuple[str | None, float]:
    """-> (what was answered, score). See the module's docstring; raises `ConfigError` if sacrebleu is missing."""
    if metric in _ANSWER_KINDS:
        kind = _ANSWER_KINDS[metric]
        answer = extract(output, kind)
        is_right = answer is not None and any(answer == extract(reference, kind) for reference in references)
        return answer, float(is_right)
    answer = output.strip() or None
    if answer is None:
        return None, 0.0
    if metric == "rouge_l":
        return answer, max(float(rouge_l("rouge_l_word", [answer, reference])[0, 1]) for reference in references)
    return answer, _chrf(answer, references)


def _chrf(output: str, references: Sequence[str]) -> float:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as exc:
        raise ConfigError("the metric chrf needs sacrebleu: pip install 'ensemble-server[compare]'") from exc
    return float(CHRF().sentence_score(output, list(references)).score) / 100


def unreadable_reference(metric: GenerationMetric, references: Sequence[str]) -> str | None:
    """The first reference in which no answer of the metric's kind is found, so that nothing could ever match it."""
    kind = _ANSWER_KINDS.get(metric)
    if kind is None:
        return next((reference for reference in references if not reference.strip()), None)
    return next((reference for reference in references if extract(reference, kind) is None), None)
