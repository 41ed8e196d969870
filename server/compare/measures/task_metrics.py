"""One output judged against the references of its item: what was answered, and a score from 0 to 1.

    exact_match              the answer's canonical text equals that of a reference
    number, choice, yes_no   the answer that is found in the output equals the one found in a reference
    regex                    the output holds a match of a reference, which is a regular expression
    json                     the JSON value in the output equals that of a reference: keys in any order, 1 equals 1.0
    rouge_l                  ROUGE-L F over words against the closest reference (`ensembles.voting.similarity`)
    chrf                     chrF2 of the sentence against the references, over 100 (sacrebleu)
    judge                    a model's preference of the output over the other arms' (`server.compare.running.judging`,
                             once all arms have answered); until then 0

Answers are found as votes find them (`ensembles.voting.answer_extraction`). An output in which nothing is found has the
answer None and scores 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.surrogates import with_mended_escapes
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.ensembles.voting.similarity import rouge_l

GenerationMetric = Literal["exact_match", "number", "choice", "yes_no", "regex", "json", "rouge_l", "chrf", "judge"]

MATCH_TIMEOUT_S = 2.0  # a pattern that backtracks without end must not hold up a comparison

_FENCED = re.compile(r"```[A-Za-z]*\n(.*?)```", re.DOTALL)

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
    if metric == "judge":
        return answer, 0.0
    if metric == "regex":
        found = next((match for one in references if (match := _match(one, output)) is not None), None)
        return found, float(found is not None)
    if metric == "json":
        value = json_value(output)
        return value, float(value is not None and any(value == json_value(reference) for reference in references))
    if metric == "rouge_l":
        return answer, max(float(rouge_l("rouge_l_word", [answer, reference])[0, 1]) for reference in references)
    return answer, _chrf(answer, references)


def _match(pattern: str, output: str) -> str | None:
    """What matched: the first group if the pattern has one. None also for a search that takes too long."""
    import regex

    try:
        found = regex.search(pattern, output, timeout=MATCH_TIMEOUT_S)
    except TimeoutError:
        return None
    return None if found is None else str(found.group(1) if found.re.groups and found.group(1) else found.group())


def json_value(text: str) -> str | None:
    """The JSON value of a text in canonical form: of all of it, else of a code block, else of the first object or list.

    'It is {"b": 1.0, "a": [2]}.' -> '{"a": [2], "b": 1}'; None where there is none.
    """
    text = with_mended_escapes(text)
    candidates = [text.strip(), *(block.strip() for block in _FENCED.findall(text))]
    for candidate in candidates:
        try:
            return _canonical(json.loads(candidate))
        except (ValueError, RecursionError):
            continue
    decoder = json.JSONDecoder()
    for start in re.finditer(r"[{\[]", text):
        try:
            return _canonical(decoder.raw_decode(text, start.start())[0])
        except (ValueError, RecursionError):
            continue
    return None


def _canonical(value: Any) -> str:
    return json.dumps(_whole(value), sort_keys=True, ensure_ascii=False)


def _whole(value: Any) -> Any:
    """With 1 for 1.0: JSON knows one kind of number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    return [_whole(one) for one in value] if isinstance(value, list) else value


def _chrf(output: str, references: Sequence[str]) -> float:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as exc:
        raise ConfigError("the metric chrf needs sacrebleu: pip install 'ensemble-server[compare]'") from exc
    return float(CHRF().sentence_score(output, list(references)).score) / 100


def unreadable_reference(metric: GenerationMetric, references: Sequence[str]) -> str | None:
    """The first reference in which no answer of the metric's kind is found, so that nothing could ever match it."""
    if metric == "judge":
        return None
    if metric == "json":
        return next((reference for reference in references if json_value(reference) is None), None)
    if metric == "regex":
        return next((reference for reference in references if not _is_pattern(reference)), None)
    kind = _ANSWER_KINDS.get(metric)
    if kind is None:
        return next((reference for reference in references if not reference.strip()), None)
    return next((reference for reference in references if extract(reference, kind) is None), None)


def _is_pattern(text: str) -> bool:
    import regex

    try:
        regex.compile(text)
    except regex.error:
        return False
    return bool(text)
