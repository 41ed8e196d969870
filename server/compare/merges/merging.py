"""From a mergekit recipe to a folder with an ordinary model: resolved, folded, merged, checked, and cached.

mergekit 0.1.5 does the arithmetic. It runs in a process of its own (`server.compare.merges.merge_process`): it keeps
every checkpoint that it read open until its process ends, seeds the process's random numbers, leaves by `sys.exit`, and
the order in which it meets its models follows the process's string hashes. A merge that runs out of memory takes
nothing else with it.

The cache key is the content: the recipe with every model replaced by the hash of its weights, the seed, and the
versions of what computes. Where a model lies or what it is called does not count, and changes no byte of the weights.

Needs the extra `compare`. Left out: revisions of hub models, deleting old merges.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.server.compare.kept.content_cache import digest, folder_digest, is_whole
from ensemble_server.server.compare.merges.recipes import Recipe, Reference, read_recipe
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel
from ensemble_server.server.weights.cache import cache_folder
from ensemble_server.server.weights.checkpoints import resolve_checkpoint

MERGE_VERSION = 1  # part of every key: raise it when the same recipe comes out otherwise
OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Fold:
    """A LoRA adapter to be folded into its base. `target`: its place in the cache."""

    name: str
    base: Path
    adapter: Path
    target: Path


@dataclass(frozen=True)
class Merge:
    """A recipe to be merged. `models`: names in `recipe` -> folders; the first gives its tokenizer to the result."""

    target: Path
    method: str
    recipe: Mapping[str, Any]
    models: Mapping[str, Path]
    makes_own_tokenizer: bool
    seed: int
    description: Mapping[str, Any]


@dataclass(frozen=True)
class Build:
    """Everything that one merge takes."""

    folds: tuple[Fold, ...]
    merge: Merge


def build_merge(
    recipe: Mapping[str, Any] | Path,
    config: Config | None,
    cache: Path | None = None,
    *,
    folder: Path | None = None,
    seed: int = 0,
    on_stage: OnStage = lambda stage: None,
) -> Path:
    """The folder of the merged model; made if the cache does not hold it. Blocks, for minutes with large models.

    `recipe`: mergekit's YAML (a file, or its value), in which `model:` may also name a hosted model of `config`.
    `cache`: default `$ENSEMBLE_CACHE`. `folder`: where relative paths of a recipe that is no file start; default the
    config's folder. `seed`: of the methods that draw random numbers (dare_*, della*, some gates of a moe).
    `on_stage` hears what is being done. Raises `ConfigError` (the recipe is wrong, mergekit is missing) or
    `ModelLoadError` (a model cannot be had, or the merge is no sound model).
    """
    checked = check_recipe(recipe, config, folder=folder)
    build = plan_build(checked, config, cache or cache_folder(), seed=seed)
    if build.merge.target.is_dir() and is_whole(build.merge.target):
        return build.merge.target
    _run_in_own_process(build, on_stage)
    return build.merge.target


def check_recipe(recipe: Mapping[str, Any] | Path, config: Config | None, *, folder: Path | None = None) -> Recipe:
    """The recipe, if it is one that mergekit reads and its names are no ensembles. Looks at no weights.

    Raises `ConfigError`.
    """
    start = config.source.absolute().parent if config is not None else Path.cwd()
    checked = read_recipe(recipe, folder=folder or start)
    for reference in checked.references:
        _hosted(reference, config)
    return checked


def plan_build(recipe: Recipe, config: Config | None, cache: Path, *, seed: int = 0) -> Build:
    """What must be folded and merged for `recipe`, with its places in `cache`. May convert or download checkpoints."""
    inputs = {reference.written: _resolved(reference, recipe, config) for reference in recipe.references}
    folds: dict[str, Fold] = {}
    digests: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for written, (base, adapter) in inputs.items():
        digests[written] = _model_digest(base, adapter)
        folders[written] = base
        if adapter is not None:
            fold = Fold(written, base, adapter, cache / "folded" / digests[written])
            folds[written], folders[written] = fold, fold.target

    # The recipe gets names that say what the weights are and in which place they stand, and nothing else.
    names = {written: f"{place}-{digests[written][:16]}" for place, written in enumerate(inputs)}
    data = recipe.with_models(lambda reference: names[reference.written])
    if folds and data.get("dtype") is None:
        data["dtype"] = "float32"  # what was folded is; mixed with a bfloat16 base the result would be cut down to it
    key = digest(
        {
            "recipe": data,
            "models": [digests[written] for written in inputs],
            "seed": seed,
            "versions": [MERGE_VERSION, *(version(package) for package in ("mergekit", "torch", "transformers"))],
        }
    )
    merge = Merge(
        target=cache / "merges" / key,
        method=recipe.method,
        recipe=data,
        models={names[written]: folders[written] for written in inputs},
        makes_own_tokenizer=recipe.makes_own_tokenizer,
        seed=seed,
        description={
            "recipe": recipe.data,
            "seed": seed,
            "models": digests,
            "mergekit": version("mergekit"),
        },
    )
    return Build(tuple(folds.values()), merge)


def _model_digest(base: Path, adapter: Path | None) -> str:
    if adapter is None:
        return folder_digest(base)
    return digest(
        {"base": folder_digest(base), "adapter": folder_digest(adapter), "versions": [MERGE_VERSION, version("peft")]}
    )


def _hosted(reference: Reference, config: Config | None) -> HostedModel | None:
    """The config's model that `reference` names; None for a path or a hub id. `ConfigError` if it has no weights."""
    models = config.models if config is not None else {}
    entry = models.get(reference.written, models.get(reference.path))
    if entry is not None and not isinstance(entry, HostedModel):
        raise ConfigError(
            f"merge: {reference.path!r} is no model with weights of its own but "
            f"{'a remote model' if isinstance(entry, RemoteModel) else 'an ensemble'}; "
            "name hosted models, folders or hub ids"
        )
    return entry


def _resolved(reference: Reference, recipe: Recipe, config: Config | None) -> tuple[Path, Path | None]:
    """Folders of the weights and of the adapter on them."""
    if reference.revision is not None and _hosted(reference, config) is None:
        raise ConfigError(f"{recipe.source}: {reference.written!r}: revisions are not supported; give a folder")
    hosted = _hosted(reference, config)
    lora = None
    if reference.lora is not None and (
        hosted is None or config is None or config.models.get(reference.written) is not hosted
    ):
        lora = recipe.folder / Path(reference.lora).expanduser()
    try:
        if hosted is None:
            base, adapter = resolve_checkpoint(reference.path, relative_to=recipe.folder), None
        else:
            assert config is not None, "a hosted model is one of a config's"
            root = hosted if hosted.base is None else config.models[hosted.base]
            assert isinstance(root, HostedModel) and root.path is not None, "a base has weights of its own"
            folder = config.source.absolute().parent
            base = resolve_checkpoint(root.path, relative_to=folder, revision=root.revision)
            adapter = None if hosted.adapter is None else Path(hosted.adapter)
            if hosted.delta is not None:
                raise ModelLoadError("a delta cannot be merged; name the fine-tune that it was made from")
    except ModelLoadError as exc:
        raise ModelLoadError(f"{recipe.source}: model {reference.written!r}: {exc}") from exc
    if lora is not None and adapter is not None:
        raise ConfigError(
            f"{recipe.source}: {reference.path!r} already has an adapter, {reference.lora!r} is a second one"
        )
    adapter = lora or adapter
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise ModelLoadError(
            f"{recipe.source}: model {reference.written!r}: {adapter} holds no adapter_config.json; give the folder "
            "of a LoRA adapter"
        )
    return base, adapter


# --- the process ---


def _run_in_own_process(build: Build, on_stage: OnStage) -> None:
    # -P: the folder that the user stands in is no place to import from.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",  # every model has been resolved to a folder
        "PYTHONHASHSEED": "0",  # mergekit walks sets of names
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="ensemble-merge-") as scratch:
        job, log = Path(scratch, "job.json"), Path(scratch, "log.txt")
        job.write_text(build_to_json(build), encoding="utf-8")
        with (
            log.open("wb") as stderr,
            subprocess.Popen(
                [sys.executable, "-P", "-m", "ensemble_server.server.compare.merges.merge_process", str(job)],
                stdin=subprocess.PIPE,  # nothing is written: it closes when this process ends, and the other ends, too
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                text=True,
                encoding="utf-8",
            ) as process,
        ):
            try:
                error = _follow(process, on_stage)
            except BaseException:
                process.kill()
                raise
        if error is not None:
            raise ModelLoadError(f"{build.merge.method} merge: {error}")
        if process.returncode != 0:
            tail = " ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
            reason = f"was stopped by signal {-process.returncode}" if process.returncode < 0 else "ended"
            raise ModelLoadError(
                f"{build.merge.method} merge: the process that merges {reason} ({tail or 'no message'}); "
                "it may have run out of memory"
            )


def _follow(process: subprocess.Popen[str], on_stage: OnStage) -> str | None:
    """Pass on what the process says it does; the error that it reports, if it reports one."""
    error = None
    for line in process.stdout or ():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if "stage" in event:
            on_stage(event["stage"])
        error = event.get("error", error)
    process.wait()
    return error


def build_to_json(build: Build) -> str:
    merge = {**vars(build.merge), "target": str(build.merge.target)}
    merge["models"] = {name: str(folder) for name, folder in build.merge.models.items()}
    folds = [{key: str(value) for key, value in vars(fold).items()} for fold in build.folds]
    return json.dumps({"folds": folds, "merge": merge})


def build_from_json(text: str) -> Build:
    data = json.loads(text)
    folds = tuple(
        Fold(fold["name"], Path(fold["base"]), Path(fold["adapter"]), Path(fold["target"])) for fold in data["folds"]
    )
    merge = data["merge"] | {
        "target": Path(data["merge"]["target"]),
        "models": {name: Path(folder) for name, folder in data["merge"]["models"].items()},
    }
    return Build(folds, Merge(**merge))
