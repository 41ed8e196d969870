"""What a comparison does: one YAML file, checked as a whole before anything is loaded.

    config: demo.yaml                 # the models; inline entries below are what could stand in its `models:`
    baseline: base                    # an arm; every other one is compared with it
    arms:
      - base                          # a name of the config
      - {name: ties, merge: merges/ties.yml}                     # a mergekit recipe, as a file or inline
      - {name: fitted, ensemble: {method: probability_average, members: [base, code], weights: fitted}}
      - {name: posterior, choose: [{ensemble: {...}}, {ensemble: {...}}]}      # whichever is best on `fit`
      - {name: tuned, merge: merges/ties.yml, choose: auto}      # the same, the variants written out (`variants.py`)
      - {name: taught, distill: {ensemble: adaptive, student: base, text: [more.txt], epochs: 2}}   # and its control
      - {name: voted, answers: {sums: voted.jsonl}, kind: ensemble}            # answers that are there already
    text: {code: code_test.txt, mixed: {switching: [code, prose], piece_bytes: 380, bytes: 48000}}
    fit: {code: {path: code_train.txt, tail: 0.05}}              # for weights and choices; never a test text
    tasks: [{name: sums, data: sums.jsonl, metric: numeric, template: "Q: {{ question }}", dev: sums_dev.jsonl}]

Relative paths start at the file's folder, those inside an inline entry at the config's, as they do there. Every problem
is reported at once, with the nearest right key. `docs/compare.md` explains each key.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.merges.recipes import read_recipe
from ensemble_server.server.compare.planning.blocks import Arm, PlanFile
from ensemble_server.server.compare.planning.variants import written_out
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.loading import load_config, parse_config
from ensemble_server.server.config.problems import findings, nearest
from ensemble_server.server.config.strict_yaml import expand_variables, read_yaml

FITTED = "fitted"
FITTABLE = ("weights", "share")  # keys of a probability average whose value may be `fitted`


@dataclass(frozen=True)
class Plan:
    """A checked plan. `raw_config`: the config's YAML, to which arms add entries."""

    path: Path
    file: PlanFile
    config: Config
    raw_config: Mapping[str, Any]

    def extended(self, entries: Mapping[str, Mapping[str, Any]]) -> Config:
        """The config with more (or other) models. Raises `ConfigError` as `load_config` does."""
        return parse_config(
            {**self.raw_config, "models": {**self.raw_config["models"], **entries}}, source=self.config.source
        )

    @property
    def arms(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.file.arms}


# --- loading -----------------------------------------------------------------------------------------------------


def load_plan(path: Path) -> Plan:
    """The plan in the YAML file at `path`. Raises `ConfigError` that lists every problem in it and in its config."""
    data, problems = read_yaml(path)
    data, missing_variables = expand_variables(data)
    problems = [*problems, *missing_variables]
    if not isinstance(data, dict):
        raise ConfigError(_report(path, [*problems, "must be a map with the keys `config`, `baseline` and `arms`"]))
    if "models" in data and not {"baseline", "arms"} & data.keys():
        raise ConfigError(
            f"{path} is a config, not a plan: `ensemble compare --init {path}` writes a plan for it, which names it as "
            f"`config: {path.name}`, a `baseline` and `arms` among its models, and what to measure; "
            "configs/compare-demo.yaml is one"
        )
    context = {"folder": Path(os.path.abspath(path)).parent}
    try:
        file = PlanFile.model_validate(data, context=context)
    except ValidationError as exc:
        problems += findings(exc, PlanFile, data, "")
        try:  # once more without the unknown keys, so that what is wrong elsewhere is told as well
            file = PlanFile.model_validate(_without_unknown_keys(data, exc), context=context)
        except ValidationError:
            raise ConfigError(_report(path, problems)) from exc
    file = with_controls(file)
    problems += [*_file_problems(file), *_name_problems(file)]
    try:
        config = load_config(Path(file.config))
        raw_config, _ = read_yaml(Path(file.config))
    except ConfigError as exc:
        raise ConfigError(_report(path, [*problems, f"config: {exc}"])) from exc
    arms, of_variants = _written_out(file, context["folder"], config)
    problems += of_variants
    plan = Plan(path, file.model_copy(update={"arms": arms}), config, raw_config)
    problems += _model_problems(plan)
    if problems:
        raise ConfigError(_report(path, problems))
    return plan


def with_controls(file: PlanFile) -> PlanFile:
    """Every distilled arm trains as many steps as it says, whatever the time, and its control comes after it: one for
    all arms that differ in what the teacher says alone."""
    arms: list[Arm] = []
    controls: list[Distillation] = []
    for arm in file.arms:
        if arm.distill is None:
            arms.append(arm)
            continue
        wanted = arm.distill.model_copy(update={"minutes": None})
        arms.append(arm.model_copy(update={"distill": wanted}))
        told_so = wanted.model_dump(exclude_unset=True, exclude={"target", "level", "clm"})
        control = Distillation.model_validate({**told_so, "clm": 1.0})
        if wanted.clm < 1 and control not in controls:
            controls.append(control)
            told = f"control of {arm.name}: the same steps on the same text, without a teacher"
            arms.append(Arm(name=f"{arm.name}-control", description=told, distill=control))
    return file.model_copy(update={"arms": tuple(arms)})


def _written_out(file: PlanFile, folder: Path, config: Config) -> tuple[tuple[Arm, ...], list[str]]:
    arms, problems = [], []
    for index, arm in enumerate(file.arms):
        try:
            arms.append(written_out(arm, folder, config.models))
        except ConfigError as exc:
            arms.append(arm)
            problems.append(f"arms.{index}: {exc}")
    return tuple(arms), problems


def _without_unknown_keys(data: Any, error: ValidationError) -> Any:
    data = deepcopy(data)
    for details in error.errors(include_url=False, include_input=False):
        if details["type"] != "extra_forbidden":
            continue
        inside = data
        for key in details["loc"][:-1]:
            is_there = key in inside if isinstance(inside, dict) else isinstance(inside, list)
            if is_there:
                inside = inside[key]
        if isinstance(inside, dict):
            inside.pop(details["loc"][-1], None)
    return data


def _report(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return "\n  - ".join([f"{path}: {len(problems)} problems", *problems])


def is_fitted(entry: Mapping[str, Any]) -> bool:
    """Whether weights or the share of this model entry are to be fitted."""
    return any(entry.get(key) == FITTED for key in FITTABLE)


def without_fit(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry as the config knows it, its weights not fitted yet."""
    return {key: value for key, value in entry.items() if key not in FITTABLE or value != FITTED}


def _file_problems(file: PlanFile) -> Iterator[str]:
    """Files that are not there."""
    paths: list[tuple[str, str | None]] = [("config", file.config)]
    for key, texts in (("text", file.text), ("fit", file.fit)):
        paths += [(f"{key}.{name}", source.path) for name, source in texts.items()]
    for index, task in enumerate(file.tasks):
        paths += [(f"tasks.{index}.data", task.data), (f"tasks.{index}.dev", task.dev)]
    for index, arm in enumerate(file.arms):
        paths += [(f"arms.{index}.distill.text", path) for path in (arm.distill.text if arm.distill else ())]
    for at, path in dict.fromkeys(paths):
        if path is not None and not os.path.isfile(path):
            yield f"{at}: there is no file {path}"
    if file.lm_eval is not None and file.lm_eval.include_path and not os.path.isdir(file.lm_eval.include_path):
        yield f"lm_eval.include_path: there is no folder {file.lm_eval.include_path}"


def _name_problems(file: PlanFile) -> Iterator[str]:
    """Names that stand twice or refer to nothing, and settings that go against each other."""
    names = [arm.name for arm in file.arms]
    yield from (f"arms: {name!r} is listed {count} times" for name, count in Counter(names).items() if count > 1)
    if file.baseline not in names:
        yield f"baseline: there is no arm {file.baseline!r}{nearest(file.baseline, names)}"
    task_names = Counter([task.name for task in file.tasks] + list(file.lm_eval.tasks if file.lm_eval else ()))
    yield from (f"tasks: {name!r} is listed {count} times" for name, count in task_names.items() if count > 1)
    for key, texts in (("text", file.text), ("fit", file.fit)):
        plain = [name for name, source in texts.items() if source.path is not None]
        for name, source in texts.items():
            for part in source.switching:
                if part not in plain:
                    yield f"{key}.{name}.switching: there is no file text {part!r}{nearest(part, plain)}"
    if not file.text and not file.tasks and file.lm_eval is None:
        yield "nothing is measured: give `text`, `tasks` or `lm_eval`"
    if file.stride is not None and file.stride >= file.window:
        yield f"stride: must be below window, {file.window}, or tokens would be left out; got {file.stride}"
    if not file.fit:
        for index, arm in enumerate(file.arms):
            needs = next((v for v in arm.variants if arm.choose or is_fitted(v.ensemble or {})), None)
            if needs is not None:
                yield f"arms.{index}: {arm.name!r} is chosen or fitted on held-out text, but `fit` is empty"
    for index, arm in enumerate(file.arms):
        for task in arm.answers:
            if task not in [source.name for source in file.tasks]:
                yield f"arms.{index}.answers: there is no task {task!r}{nearest(task, list(task_names))}"
    tests = {source.path for source in file.text.values() if source.path}
    for name, source in file.fit.items():
        if source.path in tests:
            yield f"fit.{name}: {source.path} is a test text, too; choose on other text than is measured"
    for index, task in enumerate(file.tasks):
        if task.dev == task.data:
            yield f"tasks.{index}.dev: is the test data itself; choose on other rows than are scored"
    if file.cost_matched is not None and not any(task.dev for task in file.tasks):
        yield "cost_matched: needs a task with `dev` data, on which the best single member is chosen"
    for name in (file.cost_matched.ensembles or ()) if file.cost_matched else ():
        if name not in names:
            yield f"cost_matched.ensembles: there is no arm {name!r}{nearest(name, names)}"


def _model_problems(plan: Plan) -> Iterator[str]:
    """Arms and replicates that the config does not know or would not take."""
    known = list(plan.config.models)
    context = plan.config.engine.max_context
    if (plan.file.text or plan.file.fit) and plan.file.window > context:
        yield f"window: {plan.file.window} tokens do not fit into the config's engine.max_context, {context}"
    for index, arm in enumerate(plan.file.arms):
        at = f"arms.{index}"
        if arm.is_of_config:
            if arm.name not in plan.config.models:
                yield f"{at}: there is no model {arm.name!r} in {plan.config.source}{nearest(arm.name, known)}"
            continue
        if arm.is_recorded:
            continue  # it may be called like the model that gave the answers
        if arm.name in plan.config.models:
            yield f"{at}.name: {arm.name!r} is a model of the config, too; call the arm something else"
            continue
        if arm.distill is not None:
            for key, name in (("ensemble", arm.distill.ensemble), ("student", arm.distill.student)):
                if name not in plan.config.models:
                    yield f"{at}.distill.{key}: there is no model {name!r}{nearest(name, known)}"
        for number, variant in enumerate(arm.variants):
            where = f"{at}.choose.{number}" if arm.choose else at
            if variant.merge is not None:
                yield from _recipe_problems(variant.merge, plan.path.parent, f"{where}.merge")
            else:
                yield from _entry_problems(plan, arm.name, variant.ensemble or {}, f"{where}.ensemble")
    for index, task in enumerate(plan.file.tasks):
        if task.judge is not None and task.judge not in plan.config.models:
            yield f"tasks.{index}.judge: there is no model {task.judge!r}{nearest(task.judge, known)}"
    for name, entries in plan.file.replicates.items():
        for model in entries:
            if model not in plan.config.models:
                yield f"replicates.{name}: there is no model {model!r} to replace{nearest(model, known)}"
        if set(entries) <= set(known):
            yield from _entries_problems(plan, entries, f"replicates.{name}")


def _recipe_problems(recipe: str | Mapping[str, Any], folder: Path, at: str) -> Iterator[str]:
    if find_spec("mergekit") is None:
        return  # then its arms fail to build, and say what to install
    try:
        read_recipe(Path(recipe) if isinstance(recipe, str) else recipe, folder=folder)
    except ConfigError as exc:
        yield f"{at}: {exc}"


def _entry_problems(plan: Plan, name: str, entry: Mapping[str, Any], at: str) -> Iterator[str]:
    is_posterior = entry.get("pool") == "posterior"
    if is_fitted(entry) and entry.get("method") != "probability_average":
        yield f"{at}: only weights and share of a probability_average can be fitted"
    elif entry.get("weights") == FITTED and is_posterior:
        yield f"{at}.weights: of a posterior pool the share is fitted, not the weights; write share: {FITTED}"
    elif entry.get("share") == FITTED and not is_posterior:
        yield f"{at}.share: belongs to the posterior pool; of others the weights are fitted"
    elif entry.get("gate") is not None and is_fitted(entry):
        yield f"{at}.gate: was trained for one share; write that share, or leave the gate out"
    yield from _entries_problems(plan, {name: without_fit(entry)}, at)


def _entries_problems(plan: Plan, entries: Mapping[str, Mapping[str, Any]], at: str) -> Iterable[str]:
    try:
        plan.extended(entries)
    except ConfigError as exc:
        text = str(exc).removeprefix(f"{plan.config.source}: ")
        lines = text.split("\n  - ")[1:] or [text]
        for line in lines:
            for name in entries:
                line = line.removeprefix(f"models.{name}")
            yield f"{at}{line}" if line.startswith((".", ":")) else f"{at}: {line}"
