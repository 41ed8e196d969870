"""Whole distillations of what ensembles answer: with distributions where there are some, as plain text elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.running import runner
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.distill import run as running
from ensemble_server.server.distill import training
from ensemble_server.server.distill.card import Card
from ensemble_server.server.distill.lessons import Lessons
from ensemble_server.server.distill.run import distill
from ensemble_server.server.distill.targets import fused
from tests.server.distill.conftest import CONFIG, Quiet
from tests.server.distill.test_run import KilledError, Killing, weights_in

QUESTIONS = ("To be?", "Or not?", "What is x + 1?", "Who is quick?", "Why?", "What jumps?")
MODELS = CONFIG + "engine: {{max_batch: 2}}\n"


@pytest.fixture
def prompts(config_file: Path, tiny: dict[str, Path]) -> Path:
    config_file.write_text(MODELS.format(**tiny))
    file = config_file.with_name("prompts.jsonl")
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return file


@pytest.fixture
def config(prompts: Path, config_file: Path) -> Config:
    return load_config(config_file)


@pytest.fixture
def chat(prompts: Path) -> Callable[..., Distillation]:
    def make(**settings: Any) -> Distillation:
        usual: dict[str, Any] = {
            "ensemble": "mix",
            "student": "llama",
            "chat": [str(prompts)],
            "answer_tokens": 8,
            "held_out": 0.3,
            "top_k": 16,
            "steps": 1,
        }
        return Distillation.model_validate(usual | settings)

    return make


class Seen(list[Lessons]):
    """What was learnt, run by run."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, train = Seen(), training.train

    def noting(student: Any, lessons: Lessons, *rest: Any, **named: Any) -> training.Progress:
        found.append(lessons)
        return train(student, lessons, *rest, **named)

    monkeypatch.setattr(running, "train", noting)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that were put to a model, as they are."""
    found: list[str] = []
    answer = runner.answer_row

    async def noting(hosting: Any, row: Any, **named: Any) -> Any:
        found.append(row.body["messages"][-1]["content"])
        return await answer(hosting, row, **named)

    monkeypatch.setattr(runner, "answer_row", noting)
    return found


def mixture_of(tiny: dict[str, Path], token_ids: tuple[int, ...]) -> torch.Tensor:
    """What `mix` expects of each token but the first, (T - 1, V), by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    probs, num_tokens = [], len(AutoTokenizer.from_pretrained(tiny["llama"]))  # rows beyond are padding
    for adapter in (None, "red", "green"):
        model = AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, tiny[adapter])
        with torch.inference_mode():
            probs.append(model(input_ids=torch.tensor([token_ids])).logits[0, :-1, :num_tokens].double().softmax(-1))
    return 0.25 * probs[0] + 0.5 * probs[1] + 0.25 * probs[2]


def test_an_average_teaches_what_it_expects_of_its_answers(config, chat, seen, tiny, tmp_path) -> None:
    card = distill(config, chat(), tmp_path / "all", Quiet())
    [lessons] = seen
    assert len(lessons) == 4
    for index, window in enumerate(lessons.windows):
        assert lessons.records is not None and lessons.weights is not None
        target = fused(lessons.records[index], lessons.weights[index])
        expected = mixture_of(tiny, window.token_ids).numpy()
        scored = slice(window.first_scored - 1, None)
        kept = np.take_along_axis(expected, target.ids, axis=1)
        is_kept = np.zeros(expected.shape, dtype=bool)
        np.put_along_axis(is_kept, target.ids, True, axis=1)
        found = np.where(target.probs > 0, target.probs, kept)[scored]  # places that are filled up repeat an id
        assert found == pytest.approx(kept[scored], abs=1e-3)
        assert target.tail[scored] == pytest.approx(np.where(is_kept, 0, expected).sum(1)[scored], abs=3e-3)
        answer = window.token_ids[window.first_scored :]
        greedy = expected[scored].argmax(1)
        assert answer[0] == greedy[0], "it was answered greedily"
    assert card.has_targets and card.after.kl is not None and card.ensemble_bits_per_byte is not None
    [counts] = card.answers.values()
    assert (counts.asked, counts.taught, counts.held_out, counts.unanswered) == (6, 4, 2, 0)
    assert "prompts.jsonl" in card.files
    page = (tmp_path / "all" / "README.md").read_text()
    assert "answered prompts" in page and "with its distributions" in page


def test_a_vote_teaches_its_answers_as_plain_text(config, chat, seen, tmp_path) -> None:
    card = distill(config, chat(ensemble="vote", full=True, steps=12, learning_rate=0.003), tmp_path / "all", Quiet())
    [lessons] = seen
    assert lessons.records is None
    assert not card.has_targets and card.ensemble_bits_per_byte is None and card.after.kl is None
    losses = (tmp_path / "all" / "losses.csv").read_text().splitlines()
    assert losses[1].endswith(",")
    assert float(losses[-1].split(",")[1]) < float(losses[1].split(",")[1])
    assert "the answers of `vote`" in (tmp_path / "all" / "README.md").read_text()
    assert Card.load(tmp_path / "all") == card


@pytest.mark.slow
def test_answers_are_given_once_for_all_targets_and_beside_texts(config, chat, config_file, asked, tmp_path) -> None:
    distill(config, chat(), tmp_path / "one", Quiet())
    assert sorted(asked) == sorted(QUESTIONS)
    text = [str(config_file.with_name("text.txt"))]
    listener = Quiet()
    card = distill(config, chat(text=text, window=32, target="min_ce", level="document"), tmp_path / "two", listener)
    assert len(asked) == len(QUESTIONS)
    assert set(card.files) == {"text.txt", "prompts.jsonl"}
    assert not any("answers" in stage for stage in listener.stages)


@pytest.mark.slow
def test_a_killed_run_asks_only_what_has_no_answer(config, chat, asked, tmp_path, monkeypatch) -> None:
    class Impatient(Quiet):
        def progress(self, done: int, total: int) -> None:
            if "answers" in self.stages[-1] and done:
                raise KilledError

    with pytest.raises(KilledError):
        distill(config, chat(), tmp_path / "all", Impatient())
    asked.clear()
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(training, "MOST_TIME_FOR_CHECKPOINTS", 1e9)
    with pytest.raises(KilledError):
        distill(config, chat(steps=4), tmp_path / "all", Killing(after=2))
    assert 0 < len(asked) < len(QUESTIONS)
    asked.clear()
    distill(config, chat(steps=4), tmp_path / "all", Quiet())
    assert asked == []
    distill(config, chat(steps=4), tmp_path / "straight", Quiet())
    one, other = weights_in(tmp_path / "straight"), weights_in(tmp_path / "all")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def refusing(status: int, message: str) -> Callable[..., Any]:
    """What answers rows, but for one."""
    answer = runner.answer_row

    async def refuse(hosting: Any, row: Any, **named: Any) -> Any:
        result = await answer(hosting, row, **named)
        if "Why" not in row.body["messages"][-1]["content"]:
            return result
        error = {"message": message, "type": "server_error", "param": None, "code": "member_failed"}
        return type(result)(status, result.request_id, {"error": error})

    return refuse


@pytest.mark.slow
def test_answers_that_failed_are_asked_for_again(config, chat, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runner, "answer_row", refusing(502, "member 'red' has stopped"))
        with pytest.raises(
            ConfigError, match=r"1 of 6 prompts without an answer \(prompts.jsonl, line 5: member 'red'"
        ):
            distill(config, chat(), tmp_path / "all", Quiet())
    [counts] = distill(config, chat(), tmp_path / "all", Quiet()).answers.values()
    assert counts.unanswered == 0


@pytest.mark.slow
def test_a_prompt_that_is_at_fault_itself_is_left_out(config, chat, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "answer_row", refusing(400, "too long for member 'red'"))
    [counts] = distill(config, chat(), tmp_path / "all", Quiet()).answers.values()
    assert (counts.asked, counts.held_out, counts.unanswered) == (6, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ensemble": "vote", "clm": 0.5}, "only a probability_average can teach .* leave target, level and clm out"),
        ({"ensemble": "vote", "target": "min_ce"}, "taught as plain text"),
        ({"ensemble": "vote", "init": "merge"}, "'vote' is no average, so it has no linear merge"),
        ({"ensemble": "vote", "text": ["text.txt"]}, "--chat, without --text"),
    ],
)
def test_what_needs_distributions_is_refused_where_there_are_none(config, chat, tmp_path, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(config, chat(**settings), tmp_path / "all", Quiet())


def test_a_student_without_a_template_is_refused(config, chat, tiny, tmp_path, monkeypatch) -> None:
    from ensemble_server.server.weights.view import Surface

    monkeypatch.setattr(Surface, "has_chat_template", property(lambda self: False))
    with pytest.raises(ConfigError, match="'llama' has no chat template in which it could read prompts"):
        distill(config, chat(), tmp_path / "all", Quiet())


def test_a_prompt_too_long_for_its_answer_is_refused_before_anything_is_asked(config, chat, asked, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"prompts.jsonl, line 1: has .* an answer may have 500; only 512 fit"):
        distill(config, chat(answer_tokens=500), tmp_path / "all", Quiet())
    assert asked == []


@pytest.mark.slow
def test_other_answers_than_the_checkpoints_are_refused(config, chat, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(training, "MOST_TIME_FOR_CHECKPOINTS", 1e9)
    with pytest.raises(KilledError):
        distill(config, chat(steps=3), tmp_path / "all", Killing(after=1))
    [kept] = (tmp_path / "cache" / "teachers").glob("answers-*/answers.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    lines[0]["response"]["body"]["choices"][0]["message"]["content"] = "another"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="begun with other answers"):
        distill(config, chat(steps=3), tmp_path / "all", Quiet())


def test_prompts_that_will_be_measured_on_are_refused_before_they_are_asked(config, chat, asked, tmp_path) -> None:
    words = " ".join(f"word{number}" for number in range(60))
    lines = [{"prompt": words}, {"prompt": "Why?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "test.txt").write_text(words)
    with pytest.raises(ConfigError, match="stand in what would be trained on"):
        distill(config, chat(), tmp_path / "all", Quiet(), tests=[tmp_path / "test.txt"])
    assert asked == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat": ()}, "give at least one file to learn from"),
        ({"chat": (), "text": ["a.txt"]}, "`answer_tokens` belongs to `chat`"),
    ],
)
def test_settings_that_have_no_use_are_told(chat, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat(**settings)


@pytest.mark.slow
def test_kill_9_while_prompts_are_answered_loses_no_answer(config_file, config, chat, prompts, asked, tmp_path) -> None:
    """The process kills itself as soon as the first answers are on disk."""
    program = (
        "import os, signal; from ensemble_server.server.batch.job.store import JobStore; record = JobStore.record\n"
        "def dying(self, results):\n"
        "    record(self, results); os.kill(os.getpid(), signal.SIGKILL)\n"
        "JobStore.record = dying\n"
        "from ensemble_server.server.cli.app import main; main()"
    )
    options = ("--student", "llama", "--chat", str(prompts), "--answer-tokens", "8", "--held-out", "0.3")
    more = ("--top-k", "16", "--steps", "1", "--out", str(tmp_path / "all"))
    done = subprocess.run(
        [sys.executable, "-c", program, "distill", str(config_file), "mix", *options, *more],
        env=os.environ,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "all").exists()
    distill(config, chat(), tmp_path / "all", Quiet())
    assert 0 < len(asked) < len(QUESTIONS)
