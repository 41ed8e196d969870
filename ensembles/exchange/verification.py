"""How a model is asked to check its own answer and to write it anew, and how its verdict is read.

The answer that is checked stays what it is in a chat, the model's own message; only what it is told stands here.
"""

from __future__ import annotations

import re

CHECK = (
    "Check the answer above as if somebody else had written it: go through every step, and work out each result anew. "
    'End with the line "Verdict: correct" if all of it is right, or with the line "Verdict: wrong" if anything is not.'
)
REWRITE = (
    "According to this check the answer is wrong. Answer the question anew, without the mistakes that were found and "
    "without comments on the check."
)

_VERDICT = re.compile(
    r"\bverdict\W{0,6}(?:is\W{1,4})?(?P<not>not |in)?(?P<word>correct|right|true|yes|wrong|false|no)\b", re.IGNORECASE
)
_CONCLUSION = re.compile(
    r"\b(?:answer|solution|it|result|this)(?: above)? is (?:\w+ly )?"
    r"(?P<not>not |in)?(?P<word>correct|right|wrong|false)\b",
    re.IGNORECASE,
)


def verdict(check: str) -> bool | None:
    """Whether a check finds the answer right: "... Verdict: correct" -> True; None if it does not say.

    The last verdict counts; without any, the last sentence that calls the answer right or wrong.
    """
    for pattern in (_VERDICT, _CONCLUSION):
        if found := list(pattern.finditer(check)):
            is_good = found[-1].group("word").lower() in ("correct", "right", "true", "yes")
            return is_good != bool(found[-1].group("not"))
    return None
