"""The product's modules are its own wherever a user stands, and its processes import nothing of that folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WIDE, make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A web project of somebody else, with the names that ours has, and a package that ours uses."""
    for name in ("server.py", "ensembles.py", "yaml.py"):
        (tmp_path / name).write_text('raise SystemExit("a file of the user was imported")', encoding="utf-8")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "__init__.py").write_text('raise SystemExit("the user\'s config was imported")')
    return tmp_path


def run(folder: Path, *command: str) -> str:
    """What `command` prints, run in `folder` with this interpreter's own script or with `-c`."""
    env = os.environ | {"ENSEMBLE_CACHE": str(folder / "cache"), "PYTHONSAFEPATH": ""}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script() -> str:
    return str(Path(sys.executable).with_name("ensemble"))


def batch_code(model: Path, engine: dict[str, object]) -> str:
    """A script of a user, who has taken their own folder off the path as an installed console script has."""
    config = {"models": {"base": {"path": str(model), "dtype": "float32"}}, "engine": engine | {"max_context": 64}}
    return (
        f"import sys; sys.path.remove('') if '' in sys.path else None\n"
        f"from ensemble_server.server.batch import run_batch\n"
        f"if __name__ == '__main__':\n"
        f"    answers = run_batch({config!r}, ['To be'], model='base', max_tokens=2, temperature=0, ignore_eos=True)\n"
        f"    print(len(list(answers.texts())))\n"
    )


@pytest.mark.slow
def test_a_batch_runs_beside_files_of_the_same_names(folder: Path, tiny: dict[str, Path]) -> None:
    code = batch_code(tiny["llama"], {"kind": "transformers"})
    assert run(folder, sys.executable, "-c", code).split() == ["1"]


@pytest.mark.slow
def test_a_batch_runs_although_the_users_server_is_importable(folder: Path, tiny: dict[str, Path]) -> None:
    (folder / "yaml.py").unlink()  # a name of a package that we use would be the user's own doing here
    code = batch_code(tiny["llama"], {"kind": "transformers"}).replace("sys.path.remove('')", "None")
    assert run(folder, sys.executable, "-c", code).split() == ["1"]


@pytest.mark.slow
def test_a_merge_runs_beside_files_of_the_same_names(folder: Path, tiny: dict[str, Path]) -> None:
    models = [{"model": str(tiny["llama"])}, {"model": str(make_model(folder / "other", seed=1))}]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    (folder / "linear.yml").write_text(json.dumps(recipe), encoding="utf-8")
    run(folder, script(), "merge", "linear.yml", "--out", "merged")
    assert (folder / "merged" / "model.safetensors").is_file()


@pytest.mark.vllm
def test_vllm_starts_beside_files_of_the_same_names(folder: Path) -> None:
    model = make_model(folder / "model", **WIDE)
    engine = {"kind": "vllm", "kv_cache_gb": 0.1, "options": {"enforce_eager": True}}
    (folder / "main.py").write_text(batch_code(model, engine).replace("sys.path.remove('')", "None"), encoding="utf-8")
    assert run(folder, sys.executable, "-P", "main.py").split() == ["1"]
