from __future__ import annotations

from ensemble_server.server.batch.running.failures import MAX_HOPELESS, MAX_REASONS, FailureWatch, Reasons


def body(message: str) -> dict[str, dict[str, str]]:
    return {"error": {"message": message}}


def test_reasons_that_differ_in_numbers_and_names_only_are_one() -> None:
    reasons = Reasons.of([f"line {n}: there is no column 'c{n}'" for n in range(700)] + ["member 'x': refused"])
    assert list(reasons.sentences()) == [
        "700 rows: line 0: there is no column 'c0'",
        "1 row: member 'x': refused",
    ]


def test_the_most_frequent_reasons_are_named_and_the_rest_is_counted() -> None:
    reasons = Reasons.of(letters for n in range(26) for letters in ["ab" * n + "c"] * (n + 1))
    sentences = list(reasons.sentences())
    assert len(sentences) == MAX_REASONS + 1
    assert sentences[0].startswith("26 rows: abab")
    assert sentences[-1] == f"{sum(range(1, 17))} rows: 16 other reasons"


def test_the_first_row_of_each_reason_is_told_at_once_and_a_few_of_them_at_most() -> None:
    said: list[str] = []
    watch = FailureWatch(said.append)
    watch.failed("a", body("member 'x': cannot reach\nit"))
    watch.failed("b", body("member 'y': cannot reach\nit"))
    watch.failed("c", body("too long"))
    assert said == ["row 'a' failed: member 'x': cannot reach it", "row 'c' failed: too long"]
    for letter in "defghijklmnopq":
        watch.failed(letter, body(letter * 9))
    assert len(said) == MAX_REASONS


def test_a_run_is_hopeless_if_nothing_was_answered_and_never_once_something_was() -> None:
    watch = FailureWatch()
    for n in range(MAX_HOPELESS):
        assert not watch.is_over
        watch.failed(str(n), body("no"))
    assert watch.is_hopeless and watch.is_over
    watch.answered()
    assert not watch.is_over


def test_a_limit_counts_whatever_was_answered_and_0_is_none() -> None:
    watch, never = FailureWatch(max_errors=2), FailureWatch(max_errors=0)
    for one in (watch, never):
        one.answered()
        one.failed("a", body("no"))
        assert not one.is_over
        one.failed("b", body("no"))
    assert watch.is_over and not watch.is_hopeless
    for n in range(2 * MAX_HOPELESS):
        never.failed(str(n), body("no"))
    assert not never.is_over
