"""Students whose teachers have other vocabularies, in all three ways to tell what those expect."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.distill import run as running
from ensemble_server.server.distill import training
from ensemble_server.server.distill.lessons import Lessons
from ensemble_server.server.distill.records import WindowRecord
from ensemble_server.server.distill.run import distill
from ensemble_server.server.distill.targets import fused
from tests.server.distill.conftest import CONFIG, Quiet
from tests.thinned import first_fast

pytestmark = pytest.mark.usefixtures("without_figures")

Wanted = Callable[..., Distillation]

MORE = """\
  gemma: {{path: {gemma}, dtype: float32}}
  both: {{method: probability_average, members: {{llama: 1, gemma: 3}}}}
  moving: {{method: probability_average, members: [llama, gemma], pool: posterior, share: 0.05}}
  same: {{method: probability_average, members: [llama], vocabulary: bytes}}
  fused: {{method: probability_average, members: [llama, gemma], pool: geometric}}
"""
PLAIN = "The quick brown fox jumps over the lazy dog.\nTo be, or not to be: that is it!\n" * 3
SHORT = "The quick brown fox jumps over the lazy dog.\nTo be, or not to be: café 数学 😀!\n" * 3


@pytest.fixture
def config(config_file: Path, tiny: dict[str, Path], gemma: Path) -> Config:
    config_file.write_text((CONFIG + MORE).format(**tiny | {"gemma": gemma}))
    config_file.with_name("text.txt").write_text(SHORT)
    return load_config(config_file)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Lessons]:
    """What was learnt, run by run."""
    found: list[Lessons] = []

    def noting(student: Any, lessons: Lessons, *rest: Any, **named: Any) -> training.Progress:
        found.append(lessons)
        return training.train(student, lessons, *rest, **named)

    monkeypatch.setattr(running, "train", noting)
    return found


@pytest.mark.parametrize("align", first_fast(["em", "exact", "mined"]))
def test_every_target_is_taught_across_vocabularies(config, wanted, seen, tmp_path, align: str) -> None:
    cards, first = {}, "tokens" if align == "exact" else "moving"
    settings_of = {
        "tokens": {"target": "min_ce", "level": "token"},
        "moving": {"ensemble": "moving"},
        "documents": {"target": "avg_ce", "level": "document", "tail": False, "top_k": 10},
    }
    for name, settings in list(settings_of.items())[align != "exact" :]:
        listener = Quiet()
        told = {} if align == "exact" else {"align": align}
        cards[name] = distill(
            config, wanted(**{"ensemble": "both", "steps": 1} | told | settings), tmp_path / name, listener
        )
        assert any("reads" in stage for stage in listener.stages) == (name in (first, "documents"))
    for card in cards.values():
        assert card.align == align and card.before.kl is not None and card.ensemble_bits_per_byte is not None
    assert f"told in the student's tokens: {align}" in (tmp_path / "moving" / "README.md").read_text()
    for lessons in seen:
        assert lessons.records is not None and lessons.weights is not None
        for record, weights in zip(lessons.records, lessons.weights, strict=True):
            target = fused(record, weights, only_top=lessons.only_top)
            assert target.probs.sum(-1) + target.tail == pytest.approx(np.ones(len(target.tail)), abs=1e-3)
    assert len({(tmp_path / name / "losses.csv").read_text() for name in cards}) == len(cards)


def test_a_member_of_the_students_own_tokens_expects_of_them_what_it_expects(
    config, config_file, wanted, seen, tmp_path
) -> None:
    """Told through the bytes of the text. Other ways to spell it are summed in, so next to nothing differs where a
    random model finds them unlikely, and the pool over bytes pays no more than the tokens alone."""
    config_file.with_name("text.txt").write_text(PLAIN)
    by_bytes = distill(config, wanted(ensemble="same", steps=1), tmp_path / "bytes", Quiet())
    by_tokens = distill(config, wanted(ensemble="alone", steps=1), tmp_path / "tokens", Quiet())
    assert by_bytes.before.bits_per_byte == by_tokens.before.bits_per_byte
    assert by_bytes.align == "exact" and by_tokens.align is None
    ours, theirs = seen
    assert ours.records is not None and theirs.records is not None
    gains = []
    for window, one, other in zip(ours.windows, ours.records, theirs.records, strict=True):
        known = ~np.isnan(one.of_bytes[0])
        begins = np.cumsum(one.num_bytes) - one.num_bytes
        gains += [
            one.of_tokens[0, place] - other.of_tokens[0, place] for place in range(len(begins)) if known[begins[place]]
        ]
        assert len(window.token_ids) - 1 == len(one.num_bytes)
    assert np.mean(gains) > -0.05 and max(gains) > -1e-3
    assert by_bytes.ensemble_bits_per_byte is not None and by_tokens.ensemble_bits_per_byte is not None
    assert by_bytes.ensemble_bits_per_byte < by_tokens.ensemble_bits_per_byte + 0.1


def probabilities(record: WindowRecord) -> list[dict[int, float]]:
    """What the first row gives the tokens that are kept, position by position."""
    ids, logprobs = record.dense()
    return [
        {i: math.exp(nats) for i, nats in zip(*position, strict=True) if nats > -math.inf}
        for position in zip(ids.tolist(), logprobs[0].tolist(), strict=True)
    ]


def test_equal_tokens_are_aligned_where_vocabularies_are_one(config, config_file, wanted, seen, tmp_path) -> None:
    """EM and MinED of a member with the student's tokens are what it expects."""
    config_file.with_name("text.txt").write_text(PLAIN)
    for align in ("em", "mined"):
        distill(config, wanted(ensemble="same", align=align, steps=1), tmp_path / align, Quiet())
    distill(config, wanted(ensemble="alone", steps=1), tmp_path / "tokens", Quiet())
    *aligned, plain = seen
    assert plain.records is not None
    for lessons in aligned:
        assert lessons.records is not None
        for one, other in zip(lessons.records, plain.records, strict=True):
            assert one.of_tokens == pytest.approx(other.of_tokens, abs=2e-3)
            for ours, theirs in zip(probabilities(one), probabilities(other), strict=True):
                assert ours == pytest.approx({i: theirs[i] for i in ours}, abs=1e-3)
                assert theirs.keys() - ours.keys() <= {0, 1, 2}, "marks of a chat stand for no text"


@pytest.mark.slow
def test_the_student_comes_closer_to_teachers_of_another_vocabulary(config, wanted, tmp_path) -> None:
    card = distill(config, wanted(ensemble="both", clm=0, epochs=20, learning_rate=0.01), tmp_path / "all", Quiet())
    assert card.before.kl is not None and card.after.kl is not None
    assert card.after.kl < 0.9 * card.before.kl


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ensemble": "fused"}, "'fused' cannot teach 'llama' across vocabularies: its geometric pool"),
        ({"ensemble": "mix", "align": "em"}, "align: 'llama' and the members of 'mix' have one vocabulary"),
        ({"ensemble": "both", "init": "merge"}, "'gemma' is no adapter of 'llama'"),
    ],
)
def test_what_cannot_be_told_in_the_students_tokens_is_refused(config, wanted, tmp_path, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(config, wanted(**settings), tmp_path / "all", Quiet())


def test_answers_of_an_average_over_bytes_are_taught_as_plain_text(config, config_file, wanted, seen, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "To be?"}\n{"prompt": "Or not?"}\n')
    settings = {"ensemble": "both", "student": "llama", "chat": [str(prompts)], "answer_tokens": 4, "steps": 1}
    card = distill(config, Distillation.model_validate(settings), tmp_path / "all", Quiet())
    assert not card.has_targets and card.align is None and seen[0].records is None
    with pytest.raises(ConfigError, match="different vocabularies; leave out target"):
        distill(config, Distillation.model_validate(settings | {"clm": 0.5}), tmp_path / "other", Quiet())
