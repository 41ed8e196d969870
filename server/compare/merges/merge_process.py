"""`python -m server.compare.merges.merge_process JOB`: the process that folds, merges and checks, and then ends.

Says what it does in JSON lines on standard output: {"stage": ...}, at most one {"error": ...}. Ends when its standard
input does, which is held open by whoever waits for the merge.
`server.compare.merges.merging` starts it and says why a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import EnsembleError, ModelLoadError
from ensemble_server.server.compare.kept.content_cache import cached_folder
from ensemble_server.server.compare.merges.lora_folding import fold_adapter
from ensemble_server.server.compare.merges.merge_checks import (
    COMPANIONS,
    check_model,
    check_vocabularies,
    check_weights,
)
from ensemble_server.server.compare.merges.merging import Build, Merge, OnStage, build_from_json
from ensemble_server.server.compare.merges.widen import register_with_mergekit

DESCRIPTION_FILE = "merge.json"
TOKENIZER_FILES = (
    *COMPANIONS,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def main() -> None:
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        run(build_from_json(Path(sys.argv[1]).read_text(encoding="utf-8")), _say_stage)
    except EnsembleError as exc:
        print(json.dumps({"error": str(exc)}), flush=True)
        sys.exit(1)


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # subtle: a read of `sys.stdin` holds a lock that the interpreter wants when it ends
    os._exit(1)


def _say_stage(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


def run(build: Build, on_stage: OnStage) -> None:
    """Make what the cache lacks: first the folded adapters, then the merge of them."""
    for fold in build.folds:

        def write_folded(out: Path, fold: Any = fold) -> None:
            on_stage(f"folding the adapter of {fold.name}")
            fold_adapter(fold.base, fold.adapter, out)
            _copy(TOKENIZER_FILES, fold.base, out)

        cached_folder(fold.target, write_folded)

    def write_merged(out: Path) -> None:
        _write_merged(build.merge, out, on_stage)

    cached_folder(build.merge.target, write_merged)


def _write_merged(merge: Merge, out: Path, on_stage: OnStage) -> None:
    first = next(iter(merge.models.values()))
    if not merge.makes_own_tokenizer:
        check_vocabularies(dict(zip(_names_as_written(merge), merge.models.values(), strict=True)))
    on_stage(f"merging {len(merge.models)} models by {merge.method}")
    with _linked(merge.models, beside=out), _failures_of_mergekit():
        if merge.method == "moe":
            _merge_experts(merge, out)
        else:
            _merge(merge, out)
    # mergekit takes these from a model that string hashes choose where a recipe has no base_model; and not all of them.
    if not (merge.makes_own_tokenizer or merge.recipe.get("chat_template")):
        _copy(TOKENIZER_FILES, first, out)
    _copy(("generation_config.json",), first, out)
    _state_stored_dtype(out)
    on_stage("checking the merged model")
    check_weights(out)
    check_model(out, first, same_vocabulary=not merge.makes_own_tokenizer)
    (out / DESCRIPTION_FILE).write_text(json.dumps(merge.description, indent=1) + "\n", encoding="utf-8")


def _state_stored_dtype(folder: Path) -> None:
    """Write into config.json how the weights are stored: mergekit states the type of one of its inputs."""
    from safetensors import safe_open

    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as tensors:
        dtype = str(tensors.get_tensor(next(iter(tensors.keys()))).dtype).removeprefix("torch.")
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("dtype") != dtype:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _names_as_written(merge: Merge) -> list[str]:
    return list(merge.description["models"])


def _merge(merge: Merge, out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge

    register_with_mergekit()
    run_merge(MergeConfiguration.model_validate(dict(merge.recipe)), str(out), _options(merge))


def _merge_experts(merge: Merge, out: Path) -> None:
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build
    from transformers import set_seed

    set_seed(merge.seed)  # mergekit-moe seeds in its command line only
    config = MoEMergeConfig.model_validate(dict(merge.recipe))
    build(config, str(out), _options(merge), device="cpu", verbose=True)


def _options(merge: Merge) -> Any:
    from mergekit.options import MergeOptions

    return MergeOptions(
        random_seed=merge.seed,
        copy_tokenizer=bool(merge.recipe.get("chat_template")),
        clone_tensors=True,  # a layer that stands twice in a passthrough merge is written twice
        write_model_card=False,  # it would show places in the cache
        quiet=True,
        device="cpu",
    )


@contextlib.contextmanager
def _linked(models: Mapping[str, Path], *, beside: Path) -> Iterator[None]:
    """Inside, each model is found under its name in the working directory: mergekit sees names, not places."""
    with tempfile.TemporaryDirectory(dir=beside.parent) as workspace, contextlib.chdir(workspace):
        for name, folder in models.items():
            Path(workspace, name).symlink_to(folder.absolute(), target_is_directory=True)
        yield


@contextlib.contextmanager
def _failures_of_mergekit() -> Iterator[None]:
    """Turns whatever mergekit raises, and the logging and `sys.exit` of mergekit-moe, into a `ModelLoadError`."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield
    except SystemExit as exc:
        raise ModelLoadError(f"mergekit-moe refused: {' '.join(records) or 'no reason given'}") from exc
    except Exception as exc:
        hint = ""
        if "allow-crimes" in str(exc):
            hint = "; merge models of one architecture"
        elif "size" in str(exc) or "shape" in str(exc):
            hint = "; merge models of one shape, and give the recipe a `tokenizer` where vocabularies differ"
        raise ModelLoadError(f"mergekit failed ({type(exc).__name__}: {exc}){hint}") from exc
    finally:
        logging.getLogger().removeHandler(handler)


def _copy(names: tuple[str, ...], source: Path, out: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copy(source / name, out / name)


if __name__ == "__main__":
    main()
