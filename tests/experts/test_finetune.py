"""The two adapters that answer word problems, and how their questions and answers are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ensemble_server.ensembles.voting.answer_extraction import extract
from experts.finetune import DATA, TARGET_MODULES, math_turns, options_of, options_turns

ROOT = Path(__file__).resolve().parents[2]
ROWS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def test_no_question_of_the_tests_is_learned():
    learned = {row["question"] for row in ROWS}
    for name in ("gsm8k_test_200", "svamp_150", "aqua_dev_120"):
        tested = (ROOT / f"data/tasks/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert not learned & {json.loads(line)["question"] for line in tested}


def test_the_answer_that_is_learned_is_the_one_that_is_extracted():
    for row in ROWS[:20]:
        assert extract(math_turns(row)[1], "number") == extract(row["answer"], "number")
        assert extract(options_turns(row)[1], "choice") == options_of(row)[1]


def test_questions_come_in_the_words_of_the_tasks_without_marks_of_the_calculator():
    for asked, answer in (math_turns(ROWS[0]), options_turns(ROWS[0])):
        assert asked.startswith(ROWS[0]["question"]) and "\\boxed{}" in asked and "{{" not in asked
        assert "<<" not in answer


def test_there_are_five_different_options_and_one_is_right():
    for row in ROWS:
        options, letter = options_of(row)
        values = [option.partition(")")[2] for option in options]
        assert len(set(values)) == 5
        right = row["answer"].replace(",", "")
        assert [option for option in options if option.startswith(letter)] == [f"{letter}){right}"]


@pytest.mark.parametrize("kind", ["math", "options"])
def test_the_adapter_is_small_names_its_base_and_has_a_card(kind):
    folder = ROOT / "experts" / f"qwen-{kind}"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert (folder / "adapter_model.safetensors").stat().st_size < 5_000_000
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == len(config["layers_to_transform"]) * len(TARGET_MODULES) * 2
    for weight in weights.values():
        assert weight.dtype == torch.float16 and torch.isfinite(weight).all() and weight.any()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"python experts/finetune.py {kind}" in card and "apache-2.0" in card
