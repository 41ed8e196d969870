"""A plan for a config: its members, its ensembles and the merges that suit, with comments, ready to be filled in.

It loads and runs as it is, on a few questions that are written beside it and that say nothing of anybody's work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.compare.planning.plan import load_plan
from ensemble_server.server.config.blocks import Config, HostedModel
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.disk.whole_file import write_whole

QUESTIONS_FILE = "compare-questions.jsonl"
QUESTIONS = (
    ("What is 12 + 30?", 42),
    ("What is 7 times 8?", 56),
    ("A box holds 6 eggs. How many eggs are in 4 boxes?", 24),
    ("What is 100 - 37?", 63),
    ("How many days are in two weeks?", 14),
    ("What is half of 90?", 45),
)
SHAPE = ("architectures", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")


@dataclass(frozen=True)
class Written:
    """`arms`: names by kind. `left_out`: what was not proposed, and why."""

    plan: Path
    questions: Path
    arms: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...]


def write_proposed_plan(config_path: Path, plan_path: Path) -> Written:
    """Write a plan for the config, and `QUESTIONS_FILE` beside it unless it is there. Both load.

    Raises `ConfigError` if the config cannot be read or has fewer than two models, or if one of the files is there.
    """
    config = load_config(config_path)
    if plan_path.exists():
        raise ConfigError(f"{plan_path} is there already; give the plan another name")
    members = [name for name, entry in config.models.items() if not isinstance(entry, MethodConfig)]
    ensembles = [name for name, entry in config.models.items() if isinstance(entry, MethodConfig)]
    if len(config.models) < 2:
        raise ConfigError(f"{config_path}: has one model; a comparison needs at least two")
    questions = plan_path.parent / QUESTIONS_FILE
    if not questions.exists():
        rows = [json.dumps({"question": question, "answer": answer}) for question, answer in QUESTIONS]
        write_whole(questions, ("\n".join(rows) + "\n").encode())
    merges, left_out = _merges(config)
    for attempt in (merges, {}):
        text = _as_yaml(config, config_path, plan_path, members, ensembles, attempt)
        write_whole(plan_path, text.encode())
        try:
            load_plan(plan_path)
        except ConfigError as exc:
            if not attempt:
                plan_path.unlink()
                raise
            left_out = (*left_out, f"merges: {exc}")
        else:
            arms = {"single models": tuple(members), "ensembles": tuple(ensembles), "merges": tuple(attempt)}
            return Written(plan_path, questions, arms, left_out)
    raise AssertionError("the second attempt returns or raises")


def _merges(config: Config) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Arm -> recipe, of the models that can be merged: adapters of one base, or whole checkpoints of one shape."""
    hosted = {name: entry for name, entry in config.models.items() if isinstance(entry, HostedModel)}
    groups: dict[str, list[str]] = {}
    left_out = []
    for name, entry in hosted.items():
        if entry.base is not None:
            groups.setdefault(f"base {entry.base}", []).append(name)
        elif (shape := _shape(config, entry)) is not None:
            groups.setdefault(shape, []).append(name)
        else:
            left_out.append(f"no merge of {name}: its config.json is not on this disk")
    parts = max(groups.values(), key=len, default=[])
    if len(parts) < 2:
        left_out.append("no merge: no two models are adapters of one base, or checkpoints of one shape, on this disk")
        return {}, tuple(left_out)
    weight = round(1 / len(parts), 4)
    models = [{"model": name, "parameters": {"weight": weight}} for name in parts]
    taken = set(config.models)
    found = {"merge-linear": {"merge_method": "linear", "models": models}}
    base = hosted[parts[0]].base
    if base is not None:
        tuned = [{"model": name, "parameters": {"weight": round(2 * weight, 4)}} for name in parts]
        found["merge-task-arithmetic"] = {"merge_method": "task_arithmetic", "base_model": base, "models": tuned}
    return {name: recipe | {"dtype": "float32"} for name, recipe in found.items() if name not in taken}, tuple(left_out)


def _shape(config: Config, entry: HostedModel) -> str | None:
    folder = config.source.absolute().parent / (entry.path or "")
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return json.dumps([said.get(key) for key in SHAPE])


def _has_no_template(config: Config) -> Iterator[str]:
    """Hosted models on this disk that cannot be asked as a chat."""
    for name, entry in config.models.items():
        if not isinstance(entry, HostedModel) or entry.path is None or entry.chat_template is not None:
            continue
        folder = config.source.absolute().parent / entry.path
        try:
            said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "chat_template" not in said and not list(folder.glob("chat_template*")):
            yield name


def _as_yaml(
    config: Config,
    config_path: Path,
    plan_path: Path,
    members: list[str],
    ensembles: list[str],
    merges: Mapping[str, Mapping[str, Any]],
) -> str:
    is_chat = not any(_has_no_template(config))
    lines = [
        f"# A comparison of the models of {config_path.name}, written by `ensemble compare --init`.",
        "# It runs as it is, on a few sums; what decides for you is marked FILL IN. Every key: docs/compare.md",
        "#   ensemble compare PLAN --dry-run        what it will take",
        "#   ensemble compare PLAN --out FOLDER     measure, and write the report",
        "",
        f"config: {_flow(_seen_from(config_path, plan_path.parent))}",
        f"baseline: {_flow(members[0] if members else ensembles[0])}    # all others are compared with it",
        "",
        "arms:",
    ]
    if members:
        lines += ["  # Single models: what an ensemble has to beat.", *(f"  - {_flow(name)}" for name in members)]
    if ensembles:
        lines += ["  # Ensembles of them.", *(f"  - {_flow(name)}" for name in ensembles)]
    if merges:
        lines += [
            "  # Weight merges of the same models: one model's price. Weights are guessed, not tuned.",
            *(f"  - {{name: {_flow(name)}, merge: {_flow(dict(recipe))}}}" for name, recipe in merges.items()),
        ]
    lines += [
        "",
        "# FILL IN the questions that you care about, one JSON object a line; a verdict needs some hundred of them.",
        "# metric: exact_match, number, choice, yes_no, regex, json, multiple_choice, rouge_l, chrf, judge",
        "tasks:",
        f"  - name: {_flow(Path(QUESTIONS_FILE).stem)}",
        f"    data: {_flow(QUESTIONS_FILE)}         # FILL IN",
        "    metric: number",
        '    template: "{{ question }}"',
        f"    chat: {'true' if is_chat else 'false   # a model here has no chat template: the prompt is continued'}",
        "    max_tokens: 128",
        "    # dev: other-questions.jsonl            # FILL IN: for samples at the same cost",
        "",
        "# FILL IN texts of your domain that no model was trained on, for bits per byte.",
        "# text:",
        "#   mine: path/to/test.txt",
        "# fit:                                      # other text of the kind, for `weights: fitted` and `choose`",
        "#   mine: path/to/held-out.txt",
        "",
        "cost: {concurrency: [1, 16]}                # answers at once; [] measures no speed",
        "statistics: {margin_bpb: 0.01, margin_score: 0.02}    # FILL IN: the smallest differences that matter to you",
        "",
    ]
    return "\n".join(lines)


def _seen_from(path: Path, folder: Path) -> str:
    """A config as the plan names it: from the plan's folder where it lies there or below, else from the root."""
    absolute, root = path.absolute(), folder.absolute()
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("...").strip()
