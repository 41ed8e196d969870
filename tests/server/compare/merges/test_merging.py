"""Merges of real tiny models: the arithmetic, the folding of adapters, the cache, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ensemble_server.ensembles.base import GenerationRequest, Sampling, collect
from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.server.compare.merges import merging, recipes
from ensemble_server.server.compare.merges.merging import build_merge, check_recipe
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from tests.conftest import make_adapter, make_model

in_own_process = merging._run_in_own_process
RECIPES = Path(__file__).parents[4] / "configs" / "merges"
EXPERTS = ("code", "jargon", "shakespeare")
SOLAR = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": "base", "layer_range": bounds}]} for bounds in ([0, 3], [1, 4])],
}
Merged = Callable[..., Path]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The demo's names on a tiny llama."""
    root = tmp_path_factory.mktemp("demo")
    base = make_model(root / "base", num_hidden_layers=4)
    models: dict[str, Any] = {"base": {"path": str(base)}}
    for seed, name in enumerate(EXPERTS):
        models[name] = {"base": "base", "adapter": str(make_adapter(root / name, base, seed=seed))}
    models["mix"] = {"method": "probability_average", "members": ["base", "code"]}
    return parse_config({"models": models}, source=root / "config.yaml")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def merged(in_this_process: None, demo: Config, cache: Path) -> Merged:
    return lambda recipe, **options: build_merge(recipe, demo, **{"cache": cache} | options)


def recipe_of(method: str, *models: str, weight: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    parameters = {} if weight is None else {"parameters": {"weight": weight}}
    return {"merge_method": method, "models": [{"model": model, **parameters} for model in models], **changes}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def parts(merged: Merged) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the base and of every expert, folded."""
    return {name: weights(merged(recipe_of("linear", name))) for name in ("base", *EXPERTS)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


# --- the arithmetic ---


def test_a_linear_merge_is_the_average_of_the_weights(merged: Merged, parts: dict[str, Any]) -> None:
    found = weights(merged(recipe_of("linear", *EXPERTS, weight=2.0)))
    assert_equal(found, {name: sum(parts[expert][name] for expert in EXPERTS) / 3 for name in parts["base"]})


def test_task_arithmetic_adds_multiples_of_what_was_learnt(merged: Merged, parts: dict[str, Any]) -> None:
    found = weights(merged(recipe_of("task_arithmetic", "code", "jargon", weight=0.3, base_model="base")))
    base = parts["base"]
    expected = {
        name: base[name] + 0.3 * sum(parts[expert][name] - base[name] for expert in ("code", "jargon")) for name in base
    }
    assert_equal(found, expected)


def test_slerp_of_a_model_with_its_copy_is_that_model(merged: Merged, parts: dict[str, Any], demo: Config) -> None:
    copy = shutil.copytree(demo.models["base"].path, Path(demo.models["base"].path).parent / "copy", dirs_exist_ok=True)
    recipe = recipe_of("slerp", "base", str(copy), weight=None, base_model="base", parameters={"t": 0.3})
    assert_equal(weights(merged(recipe)), parts["base"])


def test_slerp_keeps_the_length_between_two_models(merged: Merged, parts: dict[str, Any]) -> None:
    recipe = recipe_of("slerp", "code", "jargon", weight=None, base_model="code", parameters={"t": 0.5})
    found = weights(merged(recipe))
    name = "model.layers.1.mlp.up_proj.weight"
    code, jargon = (parts[expert][name].flatten().double() for expert in ("code", "jargon"))
    angle = torch.arccos(code @ jargon / code.norm() / jargon.norm())
    expected = torch.sin(angle / 2) / torch.sin(angle) * (code + jargon)
    torch.testing.assert_close(found[name].flatten().double(), expected, rtol=0, atol=1e-6)


def test_passthrough_stacks_the_layers_that_it_is_told(merged: Merged, parts: dict[str, Any]) -> None:
    folder = merged(SOLAR)
    found = weights(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 6
    sources = [0, 1, 2, 1, 2, 3]
    for place, source in enumerate(sources):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(found[name.format(place)], parts["base"][name.format(source)])
    assert not any(name.startswith("model.layers.6.") for name in found)


def test_an_adapter_is_folded_as_peft_computes_it(parts: dict[str, Any], demo: Config) -> None:
    adapter = load_file(Path(demo.models["code"].adapter) / "adapter_model.safetensors")
    layer = "model.layers.2.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
    expected = parts["base"][f"{layer}.weight"] + 2 * b @ a  # lora_alpha / r = 2
    torch.testing.assert_close(parts["code"][f"{layer}.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "file", sorted(set(RECIPES.glob("*.yml")) - {RECIPES / "passthrough.yml"}), ids=lambda file: file.stem
)
def test_every_recipe_that_ships_gives_a_model_with_all_its_files(merged: Merged, demo: Config, file: Path) -> None:
    folder = merged(file)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "SHA256SUMS"}
    base = Path(demo.models["base"].path)
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (folder / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    description = json.loads((folder / "merge.json").read_text())
    assert description["recipe"] == yaml.safe_load(file.read_text())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_a_random_merge_repeats_with_its_seed_wherever_it_lies(merged: Merged, tmp_path: Path, method: str) -> None:
    recipe = RECIPES / f"{method.replace('_', '-')}.yml"
    first, again, other = merged(recipe), merged(recipe, cache=tmp_path / "elsewhere"), merged(recipe, seed=1)
    assert first.name == again.name != other.name
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_tokenizer_may_be_the_union_of_two(merged: Merged, tmp_path: Path) -> None:
    for seed, name in enumerate(("left", "right")):
        make_model(tmp_path / name, seed=seed, vocab_size=330, extra=(f"<{name}>",))
    recipe = recipe_of("linear", "left", "right", tokenizer={"source": "union"})
    folder = merged(recipe, folder=tmp_path)
    content = (folder / "tokenizer.json").read_text()
    assert "<left>" in content
    assert "<right>" in content


# --- served ---


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["alone", "moe", "linear"])
async def test_a_merge_is_served_as_an_ordinary_member(merged: Merged, demo: Config, recipe: str) -> None:
    folder = merged(recipe_of("linear", "code") if recipe == "alone" else RECIPES / f"{recipe}.yml")
    models = {
        "base": {"path": demo.models["base"].path},
        "code": {"base": "base", "adapter": demo.models["code"].adapter},
        "merged": {"path": str(folder)},
        "both": {"method": "probability_average", "members": ["code", "merged"]},
    }
    config = parse_config({"models": models, "engine": {"max_context": 128}}, source=demo.source)
    async with Hosting.open(config) as hosting:

        async def answer(name: str) -> str:
            sampling = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
            return (await collect(hosting.models[name], GenerationRequest(prompt="To be", sampling=sampling))).text

        assert await answer("both")
        if recipe == "alone":  # the adapter in the weights answers as the adapter beside them
            assert await answer("merged") == await answer("code")
        else:
            assert await answer("merged")


# --- the cache ---


def test_a_merge_is_made_once(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = merged(recipe_of("linear", "base", "code"))
    monkeypatch.setattr(merging, "_run_in_own_process", lambda *_: pytest.fail("was made again"))
    assert merged(recipe_of("linear", "base", "code")) == folder


def test_a_model_counts_by_its_content_not_by_its_name(merged: Merged, demo: Config, tmp_path: Path) -> None:
    shutil.copytree(demo.models["base"].path, tmp_path / "renamed")
    by_name = merged(recipe_of("linear", "base"))
    assert merged(recipe_of("linear", "./renamed"), folder=tmp_path) == by_name
    make_model(tmp_path / "renamed", seed=9)
    assert merged(recipe_of("linear", "./renamed"), folder=tmp_path) != by_name


@pytest.mark.parametrize("damage", ["shortened", "missing"])
def test_a_broken_entry_is_made_again(merged: Merged, tmp_path: Path, damage: str) -> None:
    recipe = recipe_of("linear", "base", "code", weight=0.25)
    folder = merged(recipe, cache=tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    if damage == "shortened":
        (folder / "model.safetensors").write_bytes(whole[:-8])
    else:
        (folder / "tokenizer.json").unlink()
    assert merged(recipe, cache=tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(merged: Merged, demo: Config, tmp_path: Path) -> None:
    """The real thing: a process of its own, with its stages, into an empty cache."""
    stages: list[str] = []
    build = merging.plan_build(check_recipe(RECIPES / "dare-ties.yml", demo), demo, tmp_path)
    in_own_process(build, stages.append)
    ours = merged(RECIPES / "dare-ties.yml")
    assert build.merge.target.name == ours.name
    assert (build.merge.target / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert stages == [
        *(f"folding the adapter of {name}" for name in EXPERTS),
        "merging 4 models by dare_ties",
        "checking the merged model",
    ]


def test_a_process_that_dies_is_said_to_have_died(
    demo: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging.sys, "executable", shutil.which("false"))
    with pytest.raises(ModelLoadError, match="linear merge: the process that merges ended"):
        build_merge(recipe_of("linear", "base"), demo, tmp_path)


@pytest.mark.slow
def test_the_process_ends_with_whoever_waits_for_the_merge(tmp_path: Path) -> None:
    os.mkfifo(job := tmp_path / "job.json")  # nobody writes it, so the process would wait for ever
    command = [sys.executable, "-P", "-m", "ensemble_server.server.compare.merges.merge_process", str(job)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        process.stdin.close()
        assert process.wait(120) == 1


# --- what is refused ---


def test_weights_that_are_no_numbers_are_refused(merged: Merged, tmp_path: Path) -> None:
    make_model(tmp_path / "sick")
    tensors = weights(tmp_path / "sick")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "sick" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"merged weight model\.norm\.weight holds NaN") as caught:
        merged(recipe_of("linear", "sick"), folder=tmp_path, cache=tmp_path / "cache")
    assert "lower the recipe's weights" in str(caught.value)
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "merges").iterdir())


def test_other_vocabularies_are_refused_by_name(merged: Merged, tmp_path: Path) -> None:
    make_model(tmp_path / "plain")
    make_model(tmp_path / "marked", extra=("<mark>",))
    with pytest.raises(ModelLoadError, match=r"'plain' and 'marked' have different vocabularies.*<mark>.*union"):
        merged(recipe_of("linear", "plain", "marked"), folder=tmp_path)


def test_other_architectures_and_shapes_are_refused(merged: Merged, tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="merge models of one architecture"):
        merged(recipe_of("linear", str(tiny["llama"]), str(tiny["qwen"])))
    with pytest.raises(ModelLoadError, match="merge models of one shape"):
        merged(recipe_of("linear", str(tiny["llama"]), str(make_model(tmp_path / "wide", hidden_size=64))))


def test_a_moe_of_an_architecture_without_one_is_refused_with_the_reason(merged: Merged, tiny: dict[str, Path]) -> None:
    prompts = {"positive_prompts": ["a"]}
    experts = [{"source_model": str(tiny[name]), **prompts} for name in ("gpt2", "gpt2")]
    experts[1]["positive_prompts"] = ["b"]
    with pytest.raises(ModelLoadError, match="mergekit-moe refused"):
        merged({"base_model": str(tiny["gpt2"]), "experts": experts})


def test_a_model_that_is_nowhere_is_named(merged: Merged, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model 'no/such-model'.*HF_HUB_OFFLINE"):
        merged(recipe_of("linear", "no/such-model"))
    with pytest.raises(ModelLoadError, match=r"model 'base\+nowhere'.*holds no adapter_config"):
        merged(recipe_of("linear", "base+nowhere"), folder=tmp_path)
    with pytest.raises(ConfigError, match=r"'code' already has an adapter"):
        merged(recipe_of("linear", "code+nowhere"))


def test_an_ensemble_has_no_weights_to_merge(demo: Config) -> None:
    with pytest.raises(ConfigError, match=r"'mix' is no model with weights of its own but an ensemble"):
        check_recipe(recipe_of("linear", "base", "mix"), demo)


def test_a_lora_may_be_written_as_mergekit_writes_it(merged: Merged, demo: Config, parts: dict[str, Any]) -> None:
    recipe = recipe_of("linear", f"base+{demo.models['code'].adapter}")
    assert_equal(weights(merged(recipe)), parts["code"])


def test_without_mergekit_the_way_to_install_it_is_named(demo: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ensemble-server\[compare\]'"):
        check_recipe(recipe_of("linear", "base"), demo)
