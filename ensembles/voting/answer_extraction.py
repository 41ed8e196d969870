"""The answer inside a text: a number, the letter of an option, yes or no, or a short text, in one canonical spelling.

Two texts give the same answer exactly if their canonical spellings are equal ("18", "$18.00" and "\\boxed{18}" are all
"18"), so answers can be counted, and agreement is transitive. A text in which nothing is found gives None, it abstains;
so does one that names several options or numbers where one was to be named. Blocks of thoughts (`ensembles.thoughts`)
are never looked at.

Where an answer is looked for, first hit wins:
1. the last `\\boxed{...}` or `<answer>...</answer>`, which decides alone: a box that cannot be read is no reason to
   take a number from elsewhere;
2. after the last marker: "answer is", "answer:", a short line "A: ...", "#### 18", and their like in other languages;
3. in the whole text: its last number (`numerals`); the option that its prose chooses (`options`); a leading, else the
   last yes or no; all of it.

Left out on purpose: numbers in words, units and percent signs (18 % is 18).

Reference: Wang et al., "Self-consistency improves chain of thought reasoning", https://arxiv.org/abs/2203.11171
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ensemble_server.ensembles.surrogates import loads
from ensemble_server.ensembles.thoughts import without_thoughts
from ensemble_server.ensembles.voting import latex
from ensemble_server.ensembles.voting.functions import worked_out
from ensemble_server.ensembles.voting.numerals import Numeral, canonical, exact_value, numerals
from ensemble_server.ensembles.voting.options import NoChoice, chosen_option, is_ruled_out, leading_option

AnswerKind = Literal["number", "choice", "yes_no", "text"]

_TAGGED = re.compile(r"<(?P<tag>(?:final_?)?answer)>(?P<content>.*?)(?:</(?P=tag)>|\Z)", re.IGNORECASE | re.DOTALL)
_JSON_ANSWER = re.compile(r'"(?:final_?)?answer"\s*:\s*(?P<content>"(?:[^"\\\n]|\\.){0,4000}")', re.IGNORECASE)
_END_OF_TURN = re.compile(
    r"(?:<\|(?:im_end|eot_id|eom_id|end|return|endoftext|end_of_text|end_of_turn|END_OF_TURN_TOKEN"
    r"|END_RESPONSE|end_of_solution|user)\|>|</s>|<eos>"
    r"|<end_of_turn>|<turn\|>|<｜end▁of▁sentence｜>|\[/?INST\])"
)
_MARKER = re.compile(
    r"^[ \t*_#>-]{0,9}(?:final |correct |my )?(?:answer|ans)\.?[ \t]*(?=[(\[*]*[A-J][)\]*.]*[ \t]*$)"
    r"|\bfinal answer\b|\b(?:answers?|ans)\b[^\n.:=]{0,40}?(?:\bis\b|\bare\b|\bbe\b|:|=)"
    r"|\b(?:correct|right|best|final|my) (?:option|choice)\b[^\n.:=]{0,20}?(?:\bis\b|:|=)"
    r"|\b(?:respuesta|réponse|reponse|antwort|lösung|risposta|resposta|odpowiedź|antwoord|svar(?:et)?|vastaus|odpověď"
    r"|răspuns(?:ul)?|válasz|jawaban(?:nya)?|cevap|yanıt|ответ|đáp án|đáp số|απάντηση)\b[^\n.:=]{0,40}?"
    r"(?:\b(?:es|est|ist|lautet|è|é|jest|är|er|adalah|là|je|este|on|is)\b|:|=|—|–)"
    r"|^[ \t*_]*A[ \t]*:(?=[^\n]{0,40}$)|^[ \t]*####(?=[^\n#]*\s*\Z|\s*[-+]?[$€£]?\s?\.?\d|\s*\(?[A-J]\)?\s*$)"
    r"|答案\s?[是为為:]?|答えは|正解は|答え:|정답은|정답\s*:|الإجابة(?: هي|:)|उत्तर:",
    re.IGNORECASE | re.MULTILINE,
)
_AFTER_MARKER = re.compile(r"[\s*_:=>\"“]*([^\n]*)")
_CLAUSE_END = re.compile(r"[,;.](?=\s|$)")
_REFUSAL = re.compile(
    r"\W*(?:I (?:do not|don['’]t|cannot|can['’]t|am not|have no)|I['’]m not|not sure"
    r"|unsure|unknown|unclear|none\b(?! other)|no idea|(?:cannot|can['’]t|could not) be|impossible to|there is no)",
    re.IGNORECASE,
)

_ASIDE = re.compile(r"(?<=\s)\([^()]*\)")
_BRACKETED = re.compile(r"\s*[(\[]\s*(?P<inside>[^()\[\],;]*?)\s*[)\]]\s*(?P<power>\^\s?\d{1,3})?[\s.]*")
_TWO_VALUES = re.compile(r"±|[^=]=[^=]{1,40}(?:\b(?:or|and|oder|ou)\b|[,;]\s)[^=]{1,20}=|[<>]")
_LIST_OF_TWO = re.compile(r"\s*(?:or|oder|ou|o|或)\s*[$€£]?", re.IGNORECASE)
_RANGE = re.compile(r"\s{0,3}(?:-|–|—|to|bis|à|~|～)\s*[$€£]?", re.IGNORECASE)
_DENIED = re.compile(r"\W*not [^,;.]*?(?:,|;|\.\s)?\s*(?:but|it is|it's)\b|\W*not [^;.]*(?:\.(?!\d)|$)", re.IGNORECASE)
_RULED_OUT = re.compile(r"(?:\bnot|n['’]t|\binstead of|\brather than|[≠±]|!=)\s*[$€£]?\s*\Z", re.IGNORECASE)
MAX_RULING_CHARS = 20
MAX_POWER = 100
_ABSOLUTE = re.compile(r"\|[-+]?(\d[\d.,/]{0,30})\|")  # blanks inside: the column of a table
_ONLY_FACTORIAL = re.compile(r"\s*\$?\d{1,4}!{1,2}\$?\s*")
_OPERATED = re.compile(r"(?<![A-Za-z])[xyzn]\s?[-+*/^×·]|[-+*/^×·]\s?[xyzn](?![A-Za-z])")
_SPACED_SIGN = re.compile(r"((?:\A|[=(:≈])\s*)[-–]\s+(?=[\d.$€£])")

_NEGATION = (
    r"\b(?:(?:not|never|cannot be|\w+n['’]t(?: be)?)\s+(?:\w+ly\s+|a |an |the )?"
    r"|(?:neither|none|nothing)(?: \w+){0,4}? (?:is|are|was|were|seems?) (?:\w+ly )?)"
)
_YES = "yes|true|correct|yep|yeah|oui|sí|ja|да|sì"
_NO = "no|false|incorrect|nope|non|nein|нет|untrue"
_YES_ELSEWHERE = "sim|tak|evet|ano|igen"
_NO_ELSEWHERE = "não|nie|hayır|nee|nej|ne|nem"
_YES_NO = re.compile(rf"(?P<negation>{_NEGATION})?\b(?P<word>{_YES}|{_NO})\b", re.IGNORECASE)
_LEADING_YES_NO = re.compile(
    r"[\W_]*(?P<word>yes|yep|yeah|true|no|nope|false|oui|non|nein|sí|sì|ja|да|нет"
    rf"|(?:{_YES_ELSEWHERE}|{_NO_ELSEWHERE})(?=[.,!;\n]|\W*\Z))\b(?!\?)",
    re.IGNORECASE,
)
_BOTH = re.compile(
    r"\b(?:yes|true|correct)\W{0,3}(?:n?or|and|/|,|vs\.?)\W{0,3}(?:no|false|incorrect)\b"
    r"|\b(?:no|false|incorrect)\W{0,3}(?:n?or|and|/|,|vs\.?)\W{0,3}(?:yes|true|correct)\b",
    re.IGNORECASE,
)
_NO_AS_DETERMINER = re.compile(
    r"\bno(?= (?!it|they|he|she|we|you|i|this|that|these|those|because|since|as|not|and|but|there|the|if|so|in|for)\b"
    r"[a-z])",
    re.IGNORECASE,
)
_HAN_YES_NO = re.compile(r"(?P<no>不是|不对|否|错误?|いいえ|아니[요오])|(?P<yes>是的?|对|正确|はい|네)")
_ARTICLES = re.compile(r"(?<![\w.'’])(?:a|an|the)(?=\s+\S)|^\W*(?:an|the)\W*$")
_INITIALS = re.compile(r"(?<!\w)[^\W\d_]\.(?:\s?[^\W\d_]\.)+(?!\w)|(?<!\w)(?:[^\W\d_]\.)+[^\W\d_](?!\w)")


@dataclass(frozen=True)
class _Passage:
    """A part of a text in which the answer is likely. `is_whole`: it holds the answer and nothing else."""

    text: str
    is_whole: bool


class _Abstains:
    """The type of ABSTAINS."""


ABSTAINS = _Abstains()  # looked for and not to be had: it is not looked for elsewhere
_Found = str | _Abstains | None


def extract(text: str, kind: AnswerKind) -> str | None:
    """The canonical answer in `text`, or None.

    number: "So 3/4 of $1,200.50" -> "1200.5"; fractions are reduced, and decimal where they end ("3/4" -> "0.75",
    "2/6" -> "1/3"). choice: an upper-case letter A to J. yes_no: "yes" or "no" (true and false count as these).
    text: lower case, without punctuation and English articles ("The Eiffel Tower." -> "eiffel tower").
    """
    text = _own_turn(without_thoughts(text))
    text = latex.normalized(unicodedata.normalize("NFC", text))  # not NFKC: 25 m² would read 25 m2
    found = _found(text, kind, depth=0)
    return found if isinstance(found, str) else None


def same_answer(left: str, right: str, kind: AnswerKind) -> bool:
    """Whether both texts give an answer and it is the same: ("18.00", "It costs $18", "number") -> True."""
    answer = extract(left, kind)
    return answer is not None and answer == extract(right, kind)


def _own_turn(text: str) -> str:
    """The text up to the marker that ends the turn, where special tokens were recorded with it."""
    return next((text[: end.start()] for end in _END_OF_TURN.finditer(text) if text[: end.start()].strip()), text)


def _found(text: str, kind: AnswerKind, depth: int) -> _Found:
    in_passage, in_text = _FINDERS[kind]
    if (inner := _last_box(text)) is not None and depth < 3:
        if inner.is_whole:
            found = in_passage(latex.plain(inner.text), True)
            return ABSTAINS if found is None else found
        found = _found(inner.text, kind, depth + 1)
        return ABSTAINS if found is None else found
    for marker in list(_MARKER.finditer(text))[-1:]:
        passage = _AFTER_MARKER.match(text, marker.end())
        assert passage is not None, "the pattern matches anywhere"
        if passage.group(1).strip() and not is_ruled_out(text[max(0, marker.start() - 100) : marker.end()]):
            found = in_passage(latex.plain(passage.group(1)), False)
            if found is not None:
                return found
    return in_text(latex.plain(text))


def _last_box(text: str) -> _Passage | None:
    """What stands in the last box, or between the last tags, whichever ends later; blank ones do not count."""
    boxes = [(box.end, _Passage(box.content, True)) for box in latex.boxed(text)]
    tags = [
        (match.end(), _Passage(tag := match.group("content"), _ONLY_FACTORIAL.fullmatch(tag) is not None))
        for match in _TAGGED.finditer(text)
    ]
    members = [
        (match.end(), _Passage(_unquoted(match.group("content")), False)) for match in _JSON_ANSWER.finditer(text)
    ]
    filled = [(end, passage) for end, passage in (*boxes, *tags, *members) if passage.text.strip()]
    return max(filled, key=lambda found: found[0])[1] if filled else None


def _unquoted(content: str) -> str:
    try:
        return loads(content)
    except ValueError:  # an escape that JSON does not know, as in LaTeX
        return content[1:-1]


# --- numbers -----------------------------------------------------------------------------------------------------


def _number_in_passage(passage: str, is_whole: bool) -> _Found:
    passage = _SPACED_SIGN.sub(r"\1-", passage)
    passage = worked_out(passage, is_formula=is_whole)
    if is_whole:
        return _only_number(passage)
    passage = _ABSOLUTE.sub(r"\1", passage)
    if denied := _DENIED.match(passage):
        passage = passage[denied.end() :]
    clause = _CLAUSE_END.split(passage, maxsplit=1)[0]
    for part in (clause[clause.rfind("=") + 1 :], clause, passage):  # "is 3 + 4 = 7, as 7 < 9": 7
        found = list(numerals(part))
        if not found:
            continue
        if found[0].is_symbolic or _are_alternatives(part, found):
            return ABSTAINS
        if (answer := next((spelled for number in found if (spelled := _spelled(number))), None)) is not None:
            return answer
    return None


def _only_number(passage: str) -> _Found:
    """The number of a passage that is the answer. Several of different value are none: (3, 4), or 1 or 2."""
    if _TWO_VALUES.search(passage):
        return ABSTAINS
    if bracketed := _BRACKETED.fullmatch(passage):
        if power := bracketed.group("power"):
            return _power(bracketed.group("inside"), int(power.lstrip("^ ")))
        passage = bracketed.group("inside")
    for part in (passage[passage.rfind("=") + 1 :], passage):
        part = _ASIDE.sub(" ", part) if re.match(r"\W*\d", part) else part
        found = list(numerals(part))
        if found:
            spelled = {_spelled(number) for number in found}
            if len(spelled) == 1 and None not in spelled and not _OPERATED.search(part):
                return spelled.pop()
            return ABSTAINS
    return None


def _power(base: str, power: int) -> _Found:
    """ "1/2", 2 -> "0.25" """
    value = exact_value(base)
    return ABSTAINS if value is None or power > MAX_POWER else canonical(value**power) or ABSTAINS


def _are_alternatives(part: str, found: list[Numeral]) -> bool:
    """ "3 or 4", "between 3 and 4", "3-4 hours": two numbers and no more between them than that."""
    if len(found) < 2:
        return False
    between = part[found[0].end : found[1].start]
    if _LIST_OF_TWO.fullmatch(between) or part[: found[0].start].strip(" $").lower().endswith("between"):
        return True
    is_rising = found[0].value is not None and found[1].value is not None and found[0].value < abs(found[1].value)
    return is_rising and _RANGE.fullmatch(between) is not None


def _last_number(text: str) -> _Found:
    text = worked_out(text, is_formula=False)
    found = list(numerals(text))
    for place, number in reversed(list(enumerate(found))):
        if place and _LIST_OF_TWO.fullmatch(text, found[place - 1].end, number.start):
            return ABSTAINS
        if _RULED_OUT.search(text[max(0, number.start - MAX_RULING_CHARS) : number.start]):
            continue
        if number.is_symbolic and not _is_factor(text, number):
            return ABSTAINS
        if (spelled := _spelled(number)) is not None:
            return spelled
    return None


def _is_factor(text: str, number: Numeral) -> bool:
    """ "2x as many", "3n": a word about size, or an algebraic step, after which an earlier number may be the answer."""
    return text[number.start : number.end][-1:].lower() in ("x", "y", "z", "n", "i")


def _spelled(number: Numeral) -> str | None:
    return None if number.value is None else canonical(number.value)


# --- options -----------------------------------------------------------------------------------------------------


def _choice_in_passage(passage: str, is_whole: bool) -> _Found:
    if (alone := _alone(passage)) is not None:
        return alone
    if _REFUSAL.match(passage):
        return ABSTAINS
    found = chosen_option(passage) if is_whole else leading_option(passage)
    return ABSTAINS if isinstance(found, NoChoice) else found


def _choice_in_text(text: str) -> _Found:
    if (alone := _alone(text)) is not None:
        return alone
    found = chosen_option(text)
    return ABSTAINS if isinstance(found, NoChoice) else found


def _alone(text: str) -> str | None:
    match = re.fullmatch(r"[\W_]*([A-Ja-j])(?![+#'’°%&]|-\Z)[\W_]*", text)
    return match.group(1).upper() if match else None


# --- yes and no --------------------------------------------------------------------------------------------------


def _yes_no_in_passage(passage: str, is_whole: bool) -> _Found:
    if _BOTH.match(passage.lstrip(" *_\"'([")) or _REFUSAL.match(passage):
        return ABSTAINS
    return _yes_no(passage, takes_first=True)


def _yes_no_in_text(text: str) -> _Found:
    return _yes_no(text, takes_first=False)


def _yes_no(text: str, *, takes_first: bool) -> str | None:
    is_only_both = _BOTH.search(text) is not None
    text = _NO_AS_DETERMINER.sub(" ", _BOTH.sub(" ", text))
    if (leading := _LEADING_YES_NO.match(text)) and not is_only_both:
        return _as_yes_no(leading.group("word"), False)
    hits = list(_YES_NO.finditer(text))
    if hits:
        hit = hits[0] if takes_first else hits[-1]
        return _as_yes_no(hit.group("word"), bool(hit.group("negation")))
    if not any(char.isascii() and char.isalpha() for char in text) and (han := _HAN_YES_NO.search(text)):
        return "no" if han.group("no") else "yes"
    return None


def _as_yes_no(word: str, is_negated: bool) -> str:
    return "yes" if (word.lower() in f"{_YES}|{_YES_ELSEWHERE}".split("|")) != is_negated else "no"


# --- short texts -------------------------------------------------------------------------------------------------


def _text_in_passage(passage: str, is_whole: bool) -> _Found:
    return _bare_text(passage)


def _bare_text(text: str) -> str | None:
    text = _INITIALS.sub(lambda initials: re.sub(r"[.\s]", "", initials.group()), _ARTICLES.sub(" ", text.lower()))
    letters = "".join(char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in text)
    return " ".join(letters.split()) or None


_FINDERS: dict[AnswerKind, tuple[Callable[[str, bool], _Found], Callable[[str], _Found]]] = {
    "number": (_number_in_passage, _last_number),
    "choice": (_choice_in_passage, _choice_in_text),
    "yes_no": (_yes_no_in_passage, _yes_no_in_text),
    "text": (_text_in_passage, _bare_text),
}
