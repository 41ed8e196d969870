from __future__ import annotations

import pytest

from ensemble_server.ensembles.exchange.verification import verdict


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("All steps hold.\nVerdict: correct", True),
        ("Step 2 is off.\n**Verdict: wrong**", False),
        ("Verdict: **correct**.", True),
        ("verdict: not correct", False),
        ("Verdict: incorrect", False),
        ("The verdict is right.", True),
        ("Verdict: wrong? No, 3 * 6 is 18. Verdict: correct", True),
        ("The answer is correct.", True),
        ("So the answer above is clearly wrong.", False),
        ("It is not right, since 3 * 6 = 18.", False),
        ("The solution is incorrect.", False),
        ("Step 1 is wrong. Verdict: correct", True),
        ("I checked every step.", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(check: str, expected: bool | None) -> None:
    assert verdict(check) is expected
