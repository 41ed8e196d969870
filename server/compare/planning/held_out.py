"""Is what weights and variants are chosen on other text than what is measured? By content: files may be copies.

    share = of the sequences of 13 words in a test text, those that stand in one of the fitted texts, too

Thirteen words are long enough that two texts hardly share them by chance, and short enough to find a passage that was
quoted, or cut elsewhere (the length that Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C, took for
their check of test data). Of tasks it is the share of questions whose prompt is one of the `dev` rows', too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_measure import Task

NUM_WORDS = 13
MAX_SHARE = 0.1

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each is a word
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")


def shared_sequences(test: Iterable[str], fitted: Iterable[str]) -> float:
    """Of all sequences of NUM_WORDS words of the texts `test`, the share that stands in `fitted`; 0 where none is."""
    known = {sequence for text in fitted for sequence in _sequences(text)}
    found = [sequence in known for text in test for sequence in _sequences(text)]
    return sum(found) / len(found) if found else 0.0


def check_held_out(
    texts: Mapping[str, Documents], held_out: Mapping[str, Documents], *, max_share: float = MAX_SHARE
) -> str | None:
    """What the report says of the test texts and those that are fitted on; None without the latter.

    Raises `ConfigError` that names every test text of which more than `max_share` stands in the texts fitted on.
    """
    if not held_out or not texts:
        return None
    shares = _shares(texts, held_out.values())
    if told := _beyond(max_share, shares):
        raise ConfigError(
            f"fit: of the sequences of {NUM_WORDS} words in the test texts, {told} stand in the texts that are fitted "
            f"on, too; at most {max_share:.0%} may (`max_overlap`). Choose on other text than is measured"
        )
    most = max(shares, key=lambda name: shares[name])
    return (
        f"Fitted and chosen on {', '.join(held_out)}: of the sequences of {NUM_WORDS} words in the test texts, at most "
        f"{shares[most]:.1%} stand there, too ({most})."
    )


def check_not_taught(
    texts: Mapping[str, Documents], arm: str, taught: Iterable[Documents], *, max_share: float = MAX_SHARE
) -> None:
    """Raises `ConfigError` that names every test text of which too much stands in what the student `arm` learns from.

    What that student holds out of these texts counts as well.
    """
    if told := _beyond(max_share, _shares(texts, taught)):
        raise ConfigError(
            f"arms {arm}: of the sequences of {NUM_WORDS} words in the test texts, {told} stand in what its student "
            f"learns from, too; at most {max_share:.0%} may (`max_overlap`). Teach with other text than is measured"
        )


def _shares(texts: Mapping[str, Documents], others: Iterable[Documents]) -> dict[str, float]:
    """Of each text, the share of its sequences that stands in `others`."""
    known = {sequence for documents in others for sequence in _of_documents(documents)}
    return {name: _share_of(documents, known) for name, documents in texts.items()}


def _beyond(max_share: float, shares: Mapping[str, float]) -> str:
    """The texts with a larger share, as errors name them; "" if there are none."""
    return ", ".join(f"{share:.0%} of {name}" for name, share in shares.items() if share > max_share)


def _share_of(documents: Documents, known: Collection[int]) -> float:
    found = [sequence in known for sequence in _of_documents(documents)]
    return sum(found) / len(found) if found else 0.0


def check_held_out_rows(
    tasks: Mapping[str, Task], held_out: Mapping[str, Task], *, max_share: float = MAX_SHARE
) -> None:
    """Raises `ConfigError` if too many questions of a task stand among its `dev` rows, whatever the files' names."""
    for name, dev in held_out.items():
        known = {_plain(item.prompt) for item in dev.items}
        found = [_plain(item.prompt) in known for item in tasks[name].items]
        if sum(found) > max_share * len(found):
            raise ConfigError(
                f"tasks {name}: {sum(found)} of its {len(found)} questions stand in its `dev` rows, too; at most "
                f"{max_share:.0%} may (`max_overlap`). Choose on other rows than are scored"
            )


def _of_documents(documents: Documents) -> Iterator[int]:
    for stream in documents.streams:
        yield from _sequences("".join(documents.texts[index] for index in stream))


def _sequences(text: str) -> Iterator[int]:
    """A hash of each NUM_WORDS words that follow each other, of this process alone."""
    words: Sequence[str] = _WORD.findall(text.lower())
    return (hash(tuple(words[start : start + NUM_WORDS])) for start in range(len(words) - NUM_WORDS + 1))


def _plain(prompt: str) -> str:
    return " ".join(prompt.lower().split())
