"""The letter of an option, A to J, in prose: "I would go with C, since ..." names C.

A letter counts where it stands as the name of an option: in brackets or quotes, before a mark of punctuation or the
end, between words that an option's name goes with ("choose C", "C is", "C because"). "A" as an article, "I" as a
pronoun, and letters of names ("vitamin C", "e.g.") do not. All letters are judged by one rule, so that a phrase which
gives away B gives away A and I, too; the exception is "I" before a verb of the first person, which nothing could tell
apart.

What is said of a letter decides. Letters that are ruled out ("not A", "A is wrong", "rather than A") do not count;
letters joined by "and" or "or" are named together, which is no choice. Of the letters that are asserted ("it must be
C", "C is right") the one is taken, or that of a conclusion ("so C", "but then D") over what was weighed before; if
none is asserted, the only one that is named. A text that names two, or none, chooses none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from ensemble_server.ensembles.voting.option_words import (
    ADVERBS,
    AFTER,
    AFTER_AT_END,
    AFTER_I,
    AFTER_I_AND_COMMA,
    ASSERTING,
    BETWEEN,
    BETWEEN_NEGATION_AND_LETTER,
    CONNECTORS,
    COPULAS,
    ENTITIES,
    FIRST_PERSON,
    LEADING,
    NEGATIONS,
    NOT_SURNAMES,
    NOUNS,
    PAIRS_AFTER,
    RANGES,
    SUBJECTS_BEFORE_I,
    THIRD_PERSON_EXCEPTIONS,
    TURNS,
    VERBS,
)

LETTERS = "ABCDEFGHIJ"
MAX_MENTIONS = 500  # letters that are looked at, the last of a text; the rest would only cost time
MAX_TAKEN_BACK = 4  # times that a choice is taken back, the last of a passage
MAX_CHARS_TAKEN_BACK = 200
NUM_TOKENS_AROUND = 10  # how far what is said of a letter is looked for

_LATIN = r"A-Za-z\u00c0-\u024f"
_TOKEN = re.compile(rf"[{_LATIN}]+(?:['’][{_LATIN}]+)*|\d+(?:[.,]\d+)*|=>|->|[\u0370-\u1fff]+|[^\s\w]|\w|\n")
_QUOTED = re.compile(
    r"(?<![\w'’])(?:[\"“”„«‹'‘「『【<{]|\*{1,3}|_{1,2}|`)\s?(?P<letter>[A-J])\s?"
    r"(?:[\"”“»›'’」』】>}]|\*{1,3}|_{1,2}|`)(?!\w)"
)
_EMPHASIS = re.compile(r"[*`\"“”„«»]|(?<!\w)_|_(?!\w)|</?[a-zA-Z]{1,6}>")
_ROMAN = re.compile(r"\b(?:II|III|IV|ii|iii|iv)\b")
_OPTION_LINE = re.compile(
    r"^[ \t>*_#-]*[(\[]?(?:option |choice )?\**(?P<letter>[A-J])\**[)\].:](?!\w)[^\n]*", re.MULTILINE | re.IGNORECASE
)
_LABELLED = re.compile(  # an option that speaks of others: "D) Both A and B", "D (A and B are right)"
    r"[\W_]*(?:(?:option|choice|answer)\W+)?(?P<letter>[A-J])[\W_]{0,3}"
    r"(?:[).:][\W_]{0,4}?(?:(?:both|all|neither|none|either|only)\b"
    r"|(?P<first>\([A-J]\)|[A-J])(?!\w)[ ,]{0,2}(?:(?:and|or|nor)\b|&))"
    r"|(?<=\s)\((?![A-J]\))(?:both |neither |either )?\(?[A-J]\)?\W{0,2}(?:and|or|&|nor)\b)",
    re.IGNORECASE,
)
_LISTED = re.compile(  # "A. B. and C. are", "A., B. or C.": points that end no sentence
    r"(?<![\w.'’])\(?[A-J][.)](?:[,;]?[ \t]{1,3}(?:(?:and|or|nor|&)[ \t]{1,3})?\(?[A-J][.)])+"
)
_POINT_WITHIN = re.compile(  # "A. is wrong", "A.,"
    r"(?<![\w.])(?P<letter>[A-J])\.(?=[,;:]|[ \t]+(?:is|are|was|were|isn['’]t|aren['’]t|can|cannot|can['’]t|could|does"
    r"|doesn['’]t|do not|don['’]t|has|must|should|would|fails?|seems?|looks?|and|or|nor)\b)"
)
_TAKEN_BACK = re.compile(  # "(A)... no wait, (B)."
    r"\b(?:wait|actually|scratch that|correction|on second thought|i mean|sorry|rather|no(?=\W{0,3}[\s(]?[A-J]\b))\b",
    re.IGNORECASE,
)
_SAID_CORRECT = re.compile(
    r"[)\].:*\s–—-]*(?:correct|right|true|yes)\b|[^\n]*(?:✓|✔|✅|\(correct\)|←\s*correct)", re.IGNORECASE
)

# What follows a letter, in lower case, a blank between tokens.
_GLUE = r"(?:: |- |– |— |\( ?|\) )*(?:(?:\w+ly|also|both|all|itself|indeed|alone) )*"
_BEING = (
    r"(?:is|are|was|were|seems?|looks?|appears?|turns? out(?: to be)?|to be|being"
    r"|(?:would|must|should|could|can|will|has to|have to) (?:\w+ly )?be)"
)
_NEGATED_AFTER = re.compile(
    rf"{_GLUE}(?:"
    rf"{_BEING} (?:(?:\w+ly|also|both|all|just|the|an?|most|more|to be|therefore|thus) )*"
    r"(?:not|never|wrong|incorrect|false|out|impossible|invalid|eliminated|excluded|ruled|discarded|dismissed|rejected"
    r"|ignored|irrelevant|unlikely|implausible|untrue|off|mistaken|distractor|unrelated|no|too (?!\W|$)\w)"
    r"|\w+n['’]t\b|(?:do|does|did|is|are|was|can|could|should|would|will|has|have|must|may) not\b|cannot\b"
    r"|(?:can|could|must|should|may|has to) (?:also |\w+ly )*never|fails?\b|contradicts?\b|lacks?\b|makes? no\b"
    r"|(?:has|have) no\b|ignores?\b|violates?\b|confuses?\b|(?:wrong|incorrect|false|no|not|out|nicht|no es)\b"
    r"|(?:是 )?(?:错|不(?! 选))|で は な|じ ゃ な|[가이] 아 니|✗|✘|❌|×)"
)
_ASSERTED_AFTER = re.compile(
    rf"{_GLUE}(?:"
    rf"{_BEING}(?: [^\s@]+){{0,4}}? (?:correct|right|true|best|better|stronger|answers?|one|choice|option|pick|winner"
    r"|solution|it|accurate|valid|fits?)\b"
    r"|remains\b|stands\b|it is\b|wins\b|fits\b|works\b|makes (?:the most |more )?sense|matches\b|satisfies\b|holds\b"
    r"|gets my\b|(?:best|correctly) |correct\b|right\b|true\b|yes\b|对|正 确|是 (?:对|正 确)|✓|✔|✅)"
)
_I_WOULD_BE_RIGHT = re.compile(  # said of option I; "I would be happy" is not
    r"(?:would|must|should|could|can|will|may|might) (?:clearly |definitely |then |therefore |also )*"
    r"be (?:my |the |it\b|our |your |(?:correct|right|true|best)(?: |$)(?!to\b|if\b|in\b))"
    r"|rather than |for (?:sure|certain|the reasons?)\b|as (?:it|this|that|they|these|those|its|all|only)\b"
)

_CLAUSE_ENDS = frozenset(".;!?\n") | {"but", "because", "since", "so", "although", "though", "while", "whereas"}
_MARKS_AFTER = frozenset(".,;:!?)]\n=→-–—/…⇒&+") | {"=>", "->"}
_MARKS_OF_LIST_END = frozenset(".;!?)\n")
_BEFORE_EQUALS = NOUNS | {"is", "be", "choose", "pick", "select", ":", "=>", "so", "thus", "therefore", "hence"}
_NO_CLAUSE_BEFORE = ("\n", ".", ",", ";", ":")


_LETTERS = frozenset(LETTERS)
_NOT_BEFORE = frozenset("BCDEFGHJ")


class NoChoice:
    """The type of NO_CHOICE."""


NO_CHOICE = NoChoice()  # the text names options, and does not choose one of them


class _Token(NamedTuple):
    text: str
    word: str  # in lower case
    start: int

    def is_before(self, other: _Token) -> bool:
        """Whether nothing stands between them."""
        return self.start + len(self.text) == other.start


@dataclass(frozen=True)
class _Mention:
    """Letters that are named together, from token `start` to before token `end`, and what is said of them."""

    letters: frozenset[str]
    start: int
    end: int
    is_negated: bool = False
    is_asserted: bool = False
    is_asked: bool = False  # "is it C?"
    is_also: bool = False  # "C is also right"

    def choice(self) -> str | NoChoice:
        return next(iter(self.letters)) if len(self.letters) == 1 else NO_CHOICE


def chosen_option(text: str) -> str | NoChoice | None:
    """The option that a text without LaTeX chooses; NO_CHOICE if it names several, None if it names none."""
    if labelled := _labelled(text):
        return labelled.group("letter").upper()
    prose, marked_right = _without_option_list(text)
    tokens = _tokens(prose)
    found = _decided(_mentions(tokens, prose), tokens)
    return marked_right if found is None else found


def leading_option(text: str) -> str | NoChoice | None:
    """The option that a text begins with, save for words like "most likely option": "(B), since ..." -> "B".

    NO_CHOICE if it begins with several ("either C or D"); None if with something else. What is taken back at once
    ("B. No wait, C") does not count.
    """
    first, end = _leading(text)
    if not isinstance(first, str):
        return first
    for taken_back in list(_TAKEN_BACK.finditer(text, end))[: -MAX_TAKEN_BACK - 1 : -1]:
        said = text[taken_back.end() : taken_back.end() + MAX_CHARS_TAKEN_BACK]
        instead, _ = _leading(said)
        if isinstance(instead, str) and not re.match(r"[^.!\n]*\?", said):
            return instead
    return first


def _leading(text: str) -> tuple[str | NoChoice | None, int]:
    """What `text` begins with, and where that ends."""
    if labelled := _labelled(text):
        return labelled.group("letter").upper(), labelled.end()
    tokens = _tokens(text)
    first = next(iter(_mentions(tokens, text)), None)
    if first is None or first.is_negated or any(token.word not in LEADING for token in tokens[: first.start]):
        return None, 0
    return first.choice(), tokens[first.end - 1].start + 1


def _labelled(text: str) -> re.Match[str] | None:
    """The option that speaks of others with which `text` begins. "(A) (B) and (C)" is a list in order."""
    found = _LABELLED.match(text)
    if found is None:
        return None
    first = found.group("first") or ""
    is_listed = first.startswith("(") and text.lstrip(" *_").startswith("(")
    return None if is_listed and found.group("letter").upper() < first[1].upper() else found


def is_ruled_out(text: str) -> bool:
    """Whether what comes after `text` is denied by its last clause: "I do not think that the answer is"."""
    tokens = _tokens(text[-200:])
    return _is_negation(_clause_before(tokens, len(tokens)))


def _tokens(text: str) -> list[_Token]:
    """Words, numbers, marks and line ends. Quoted and emphasised letters stand in brackets, other emphasis is gone."""
    text = _POINT_WITHIN.sub(r"\g<letter> ", _LISTED.sub(_without_points, text))
    bracketed = _QUOTED.sub(lambda match: f"({match.group('letter')})".center(len(match.group())), text)
    plain = _EMPHASIS.sub(lambda match: " " * len(match.group()), bracketed)
    return [_Token(word := match.group(), word.lower(), match.start()) for match in _TOKEN.finditer(plain)]


def _without_points(listed: re.Match[str]) -> str:
    """The list with commas for points, for all letters that stand in order: in "D. A. B. and C." D is none of them.

    Without an "and" or a verb it is a list only to the eye: it may be sentences.
    """
    text, beyond = listed.group(), listed.string[listed.end() : listed.end() + 10]
    places = [place for place, char in enumerate(text) if char in LETTERS and text[place + 1 : place + 2] in (".", ")")]
    starts = [0, *(there for here, there in pairwise(places) if text[here] >= text[there]), len(text)]
    return "".join(_with_commas(text[start:end], "" if end < len(text) else beyond) for start, end in pairwise(starts))


def _with_commas(listed: str, beyond: str) -> str:
    """ "A. B. and C." -> "A, B, and C."; `beyond`: what follows."""
    is_in_sentence = re.match(r"[ \t]+[a-z]", beyond) is not None
    points = [place for place, char in enumerate(listed) if char == "."]
    if len(points) < 2 or not (is_in_sentence or re.search(r"\b(?:and|or|nor)\b|&", listed)):
        return listed
    last = points[-1]
    whole = listed[:last].replace(".,", ", ").replace(".", ",")
    return f"{whole} {listed[last + 1 :]}" if is_in_sentence else whole + listed[last:]


def _without_option_list(text: str) -> tuple[str, str | None]:
    """The text less the lines that read the options back, if several do, and the letter of the line that is right."""
    lines = list(_OPTION_LINE.finditer(text))
    if len({line.group("letter").upper() for line in lines}) < 2:
        return text, None
    right = {
        line.group("letter").upper() for line in lines if _SAID_CORRECT.match(text, line.end("letter"), line.end())
    }
    return _OPTION_LINE.sub("", text), next(iter(right)) if len(right) == 1 else None


# --- is it an option ---------------------------------------------------------------------------------------------


def _mentions(tokens: Sequence[_Token], text: str) -> list[_Mention]:
    """What a text names: upper-case letters, and only where there are none lower-case ones, which are mostly words."""
    is_roman = _ROMAN.search(text) is not None
    for letters in (LETTERS, LETTERS.lower()):
        places = [
            place
            for place, token in enumerate(tokens)
            if len(token.text) == 1 and token.text in letters and _is_option(tokens, place, is_roman)
        ]
        if places:
            mentions: list[_Mention] = []
            named = frozenset(places)
            for group in _groups(places[-MAX_MENTIONS:], tokens):
                mentions.append(_judged(group, tokens, named, mentions[-1] if mentions else None))
            return mentions
    return []


def _is_option(tokens: Sequence[_Token], place: int, is_roman: bool) -> bool:
    """Whether the letter at `place` is the name of an option."""
    token = tokens[place]
    before = tokens[place - 1] if place else _Token("\n", "\n", -2)
    after = tokens[place + 1] if place + 1 < len(tokens) else _Token("\n", "\n", token.start + 2)
    is_i = token.word == "i"
    if before.text in "([" and after.text in ")]":
        if _is_called(tokens, place - 1):
            return False
        return not (is_roman and token.text == "i")
    if is_i and is_roman:
        return before.word in NOUNS
    if _is_part_of_a_name(tokens, place, before, after):
        return False
    if is_i and _is_pronoun(tokens, place, before.word, after.word):
        return False
    if token.text.islower():
        return _is_lower_option(tokens, place, before.word, after)
    if after.text in _MARKS_AFTER or not _is_latin(after) or before.word in NOUNS:
        return True
    if after.text == "(":
        return before.word in VERBS or before.word in COPULAS or _ends_in_brackets(tokens, place + 1)
    if _goes_after(tokens, place + 1) or before.word in VERBS:
        return True
    return before.word in COPULAS and after.text[0].isupper() and len(after.text) > 1


def _is_called(tokens: Sequence[_Token], bracket: int) -> bool:
    """P(A), f(B): a bracket right behind a symbol or a short name."""
    name = tokens[bracket - 1] if bracket else None
    is_close = name is not None and name.is_before(tokens[bracket]) and _is_latin(name) and name.text[0].isalpha()
    return is_close and name is not None and len(name.text) < 4 and name.word not in NOUNS | VERBS | COPULAS | LEADING


def _is_initial(tokens: Sequence[_Token], place: int, before: _Token) -> bool:
    """ "Franklin D. Roosevelt": a point after the letter, and around both words with capitals that say nothing else."""
    if place + 2 >= len(tokens) or not before.text[0].isupper() or len(before.text) < 2:
        return False
    point, name = tokens[place + 1 : place + 3]
    return (
        point.text == "."
        and tokens[place].is_before(point)
        and len(name.text) > 1
        and name.text[0].isupper()
        and not name.text.isupper()
        and name.word not in NOT_SURNAMES
        and before.word not in NOUNS | VERBS | COPULAS | LEADING | TURNS | CONNECTORS | ADVERBS
        and not before.word.endswith("ly")
    )


def _is_part_of_a_name(tokens: Sequence[_Token], place: int, before: _Token, after: _Token) -> bool:
    """ "vitamin C", "C++", "e.g.", "A-level", "5 C", "R&D" """
    token = tokens[place]
    if before.word in ENTITIES or before.text[0].isdecimal() or before.text in _NOT_BEFORE:
        return True
    if _is_initial(tokens, place, before):
        return True
    if after.text == "=" and before.word not in _BEFORE_EQUALS and place + 2 < len(tokens):
        return tokens[place + 2].text[0].islower()  # F = ma, but not C = Paris
    if token.is_before(after):
        if after.text in "'’+#&°^_%" or after.text[0].isdecimal():
            return True
        if after.text == "/" and len(tokens) > place + 2 and after.is_before(tokens[place + 2]):
            return tokens[place + 2].text.upper() not in _LETTERS
        beyond = tokens[place + 2] if place + 2 < len(tokens) else None
        if beyond is not None and after.is_before(beyond):
            if after.text in "-–":
                return beyond.text not in _LETTERS
            if after.text == "." and len(beyond.text) == 1 and beyond.text.isalpha():
                return place + 3 < len(tokens) and tokens[place + 3].text == "."
    if before.is_before(token):
        previous = tokens[place - 2].text if place > 1 else ""
        if before.text in "/-–":
            return previous.upper() not in _LETTERS
        return before.text in "'’#&$+^_°" or (before.text == "." and len(previous) == 1 and previous.isalpha())
    return False


def _is_latin(token: _Token) -> bool:
    return token.text[0].isascii() or (token.text[0].isalpha() and token.text[0] <= "\u024f")


def _ends_in_brackets(tokens: Sequence[_Token], place: int) -> bool:
    """Whether the brackets that open at `place` are the last words of a sentence: "C (the largest)." """
    words = [token.text for token in tokens[place : place + 4 * NUM_TOKENS_AROUND]]
    if ")" not in words:
        return False
    return (*words, "\n")[words.index(")") + 1] in _MARKS_AFTER


def _goes_after(tokens: Sequence[_Token], place: int) -> bool:
    """Whether the word at `place` goes with an option's name before it, and would not with an article."""
    token = tokens[place]
    beyond = tokens[place + 1] if place + 1 < len(tokens) else _Token("\n", "\n", token.start + 50)
    if beyond.text == "-" and token.is_before(beyond):  # by-product, so-called
        return False
    if token.word in PAIRS_AFTER:
        return beyond.word in PAIRS_AFTER[token.word]
    if token.word in AFTER_AT_END:
        return not beyond.text[0].isalpha() or beyond.word in AFTER or not _is_latin(beyond)
    return token.word in AFTER or _is_third_person(tokens, place)


def _is_third_person(tokens: Sequence[_Token], place: int) -> bool:
    """Whether a verb in -s follows, adverbs before it: "clearly follows". A noun after an article is none."""
    for token in tokens[place : place + 4]:
        word = token.word
        if word in ("is", "has"):
            return True
        if word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in THIRD_PERSON_EXCEPTIONS:
            return len(word) > 2
        if not (word.endswith("ly") or word in ADVERBS):
            return False
    return False


def _is_pronoun(tokens: Sequence[_Token], place: int, before: str, after: str) -> bool:
    """Whether the "I" at `place` is whoever speaks."""
    is_named = before in NOUNS or before in VERBS or before in COPULAS
    rest = [token.word for token in tokens[place + 1 : place + 7]]
    if not after[0].isalpha():
        if before in ("and", "as", "that"):
            return not _is_behind_a_letter(tokens, place - 1)
        if before in SUBJECTS_BEFORE_I and not is_named:
            earlier = [token.text for token in tokens[max(0, place - 3) : place - 1] if token.text not in ",)"]
            return before != "but" or not _LETTERS & set(earlier[-1:])  # "not B but I"
        if after == "," and not is_named:
            follows, beyond = (*rest[1:], "", "")[:2]
            if follows == "for":
                return beyond not in ("sure", "certain")
            return follows not in AFTER_I_AND_COMMA or (follows == "as" and beyond in ("a", "an", "your", "the"))
        return False
    if not after[0].isascii() and after[0] > "\u024f":
        return False
    if _I_WOULD_BE_RIGHT.match(" ".join(rest)):
        return False
    if after in AFTER_I or _is_third_person(tokens, place + 1):
        return after in ("all", "rather", "that", "right") and not is_named
    if before in ("and", "or"):
        if not _is_behind_a_letter(tokens, place - 1):
            return True
        if after == "are":
            return False
    if before in ("but", "except") and after == "are":
        return False
    is_after_conjunction = before in ("and", "that", "so", "then", "or", "than")
    return after in FIRST_PERSON or not is_named or (is_after_conjunction and after not in AFTER)


def _is_behind_a_letter(tokens: Sequence[_Token], place: int) -> bool:
    """Whether the word at `place` joins to a letter: "E and", "E, and" """
    place -= 1
    if place > 0 and tokens[place].text == ",":
        place -= 1
    return place >= 0 and tokens[place].text in (*LETTERS, *LETTERS.lower(), ")")


def _is_lower_option(tokens: Sequence[_Token], place: int, before: str, after: _Token) -> bool:
    """A lower-case letter needs more around it: "a" and "i" are words, "e", "g" and "h" are units."""
    is_word = tokens[place].text in "ai"
    if after.text == ")" and before in _NO_CLAUSE_BEFORE:
        return True
    is_closed = after.text in _MARKS_AFTER or not _is_latin(after) or after.word in _CLOSING_LOWER
    if before in NOUNS:
        return is_closed or not is_word
    if before in VERBS or before in COPULAS:
        return is_closed and not (after.text == "-" and is_word)
    rest = " ".join(token.word for token in tokens[place + 1 : place + 7])
    is_subject = before in _NO_CLAUSE_BEFORE and after.word in ("is", "seems", "looks", "makes")
    return is_subject and _ASSERTED_AFTER.match(rest) is not None


_CLOSING_LOWER = frozenset(
    ("because", "since", "is", "was", "seems", "looks", "makes", "over", "rather", "instead", "based", "has", "for")
)


# --- what is said of it ------------------------------------------------------------------------------------------


def _groups(places: Sequence[int], tokens: Sequence[_Token]) -> list[_Mention]:
    """Letters joined by "and", "or" and the like, as one mention: "A, B and C"."""
    groups: list[list[int]] = []
    is_complete = True  # after the "and" and its letter nothing is added by a comma alone
    for place in places:
        has_connector = is_next = False
        if groups:
            first, last = groups[-1][0], groups[-1][-1]
            between = {token.word for token in tokens[last + 1 : min(place, last + NUM_TOKENS_AROUND)]}
            is_range = between == {"to"} and first > 0 and tokens[first - 1].word in RANGES
            has_connector = bool(between & CONNECTORS) or is_range
            is_next = bool(between) and (between <= BETWEEN or is_range) and (has_connector or not is_complete)
        if is_next and tokens[place].text not in {tokens[other].text for other in groups[-1]}:
            groups[-1].append(place)
            is_complete = has_connector
        else:
            groups.append([place])
            is_complete = False
    mentions = []
    for group in groups:
        inside = {
            token.word for number, token in enumerate(tokens[group[0] : group[-1]], group[0]) if number not in group
        }
        is_at_end = group[-1] + 1 == len(tokens) or tokens[group[-1] + 1].text in _MARKS_OF_LIST_END
        parts = [group] if inside & (CONNECTORS | {"to"}) or is_at_end else [[place] for place in group]
        mentions += [
            _Mention(frozenset(tokens[place].text.upper() for place in part), part[0], part[-1] + 1) for part in parts
        ]
    return mentions


def _judged(mention: _Mention, tokens: Sequence[_Token], named: frozenset[int], previous: _Mention | None) -> _Mention:
    """`mention` with what its clause says of it: "... and so is D" says what was said of `previous`.

    `named`: the places of all options, which stand as "@" in what is said.
    """
    before = _clause_before(tokens, mention.start)
    if previous is not None and [token.word for token in tokens[mention.start - 2 : mention.start]] in _LIKEWISE:
        return replace(mention, is_negated=previous.is_negated, is_asserted=previous.is_asserted)
    beyond = range(mention.end, min(mention.end + NUM_TOKENS_AROUND, len(tokens)))
    said = " ".join("@" if place in named else tokens[place].word for place in beyond)
    after = re.split(r" ?[.;!?\n]", said, maxsplit=1)[0].removeprefix(") ")
    if reply := _ASKED.match(said):
        is_yes = reply.group("yes") is not None
        return replace(mention, is_asked=True, is_asserted=is_yes, is_negated=reply.group("no") is not None)
    is_negated = _is_negation(before) or _NEGATED_AFTER.match(after) is not None
    is_said = bool(before and before[-1] in ASSERTING) or _ASSERTED_AFTER.match(after) is not None
    if is_negated and _ALL_EXCEPT.search(" ".join(before)) and _NEGATED_AFTER.match(after):
        is_negated, is_said = False, True  # "all but C are wrong"
    is_alone = set(before) <= _TURNING and not after  # "Wait, no, B."
    return replace(
        mention,
        is_negated=is_negated,
        is_asserted=not is_negated and (is_said or is_alone) and not _is_conceded(tokens, mention.start),
        is_also="also" in after.split()[:3],
    )


_ASKED = re.compile(
    r"[^.;!?\n]*\?(?: (?:(?P<yes>yes|yeah|correct|right|exactly|indeed)|(?P<no>no|nope|not|never|wrong))\b)?"
)
_TURNING = TURNS | frozenset((",", "…", "-", "–", "—"))


def _is_conceded(tokens: Sequence[_Token], place: int) -> bool:
    """ "Although C seems right, ..." """
    words = [token.word for token in tokens[max(0, place - 3) : place] if token.text not in "()"]
    if words and words[-1] in NOUNS:
        words.pop()
    return bool(words) and words[-1] in _CONCEDING


_CONCEDING = frozenset(("although", "though", "while", "whilst", "whereas"))


_LIKEWISE = [
    [word, verb]
    for word, verbs in {
        "so": "is are does do",
        "as": "is are does do",
        "neither": "is are does",
        "nor": "is are",
    }.items()
    for verb in verbs.split()
]
_ALL_EXCEPT = re.compile(
    r"(?:\A|\b(?:all|every|everything|each|any|options|choices|answers|others|them|one|option|choice|answer) )"
    r"(?:except|excluding|apart from|aside from|other than|save|bar)(?: for)?\Z"
)
_HEADED_WRONG = re.compile(  # "Wrong: A, B."
    r"\A(?:the )?(?:wrong|incorrect|false|eliminated|excluded|rejected|discarded|ruled out|not)"
    r"(?: (?:options?|choices?|answers?|ones?|letters?))? :\Z"
)


def _clause_before(tokens: Sequence[_Token], place: int) -> list[str]:
    """The last words of the clause before a mention, in lower case, less those that belong to its name."""
    words: list[str] = []
    around = tokens[max(0, place - NUM_TOKENS_AROUND) : place]
    for number, token in reversed(list(enumerate(around))):
        if token.word in _CLAUSE_ENDS and not (token.word == "so" and not words):
            if token.word == "but" and number and around[number - 1].word in ("anything", "everything", "all"):
                words.append("except")
            break
        words.append(token.word)
        if token.word == "so":
            break
    words.reverse()
    if len(words) > 1 and words[-1] == "," and words[-2] in ("therefore", "so", "thus", "hence", "is", "say", "choose"):
        words.pop()
    while words and words[-1] in _BEFORE_NAMES:
        words.pop()
    return words


_BEFORE_NAMES = frozenset(("(", "[", "option", "choice", "letter", "the", "answer", "clearly", "definitely", "either"))


def _is_negation(before: Sequence[str]) -> bool:
    """Whether a clause that begins with these words rules out what it says next."""
    if _HEADED_WRONG.match(" ".join(before)):
        return True
    for distance, word in enumerate(reversed(before)):
        earlier = before[: len(before) - distance - 1]
        if word in ("over", "no"):  # "no C"; but "there is no doubt that it is C"
            return distance == 0
        if word == "than":  # none other than
            return not {"none", "no", "nothing"} & set(earlier[-2:])
        if word in ("doubt", "doubtful"):
            return not {"no", "not", "without", "don't", "don’t", "never"} & set(earlier[-2:])
        if word == "instead" or word in NEGATIONS or word.endswith(("n't", "n’t")):
            return True
        if word not in BETWEEN_NEGATION_AND_LETTER or distance > 6:
            return False
    return False


def _decided(mentions: Sequence[_Mention], tokens: Sequence[_Token]) -> str | NoChoice | None:
    stated = [mention for mention in mentions if not mention.is_asked or mention.is_asserted or mention.is_negated]
    kept = [mention for mention in stated or mentions if not mention.is_negated]
    asserted = [mention for mention in kept if mention.is_asserted]
    if not asserted:
        letters = frozenset[str]().union(*(mention.letters for mention in kept))
        return None if not letters else next(iter(letters)) if len(letters) == 1 else NO_CHOICE
    last = asserted[-1]
    others = [mention for mention in asserted if mention.letters != last.letters]
    if others and last.is_also:
        return NO_CHOICE
    if others and not TURNS & {token.word for token in tokens[others[-1].end : last.start]}:
        return NO_CHOICE
    return last.choice()
