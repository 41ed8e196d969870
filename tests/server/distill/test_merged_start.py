"""Students that start as a merge: made from a recipe, or the folder of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.cli.distill import report_lines
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.distill.arm import distilled_entry
from ensemble_server.server.distill.card import Card
from ensemble_server.server.distill.merged_start import merged_start
from ensemble_server.server.distill.run import distill
from tests.conftest import make_model
from tests.server.distill.conftest import Quiet

pytestmark = pytest.mark.usefixtures("without_figures")

Wanted = Callable[..., Distillation]

# Depth up-scaling of a model with two layers: three, of which the first two are the model's.
SOLAR = """\
merge_method: passthrough
slices:
  - sources: [{model: llama, layer_range: [0, 2]}]
  - sources: [{model: llama, layer_range: [1, 2]}]
dtype: float32
"""


@pytest.fixture
def recipe(tiny: dict[str, Path], config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose merge is there: `deep`, which has three layers, too. mergekit itself takes many seconds."""

    def made(*recipe: object, **options: object) -> Path:
        return tiny["deep"]

    monkeypatch.setattr("ensemble_server.server.distill.merged_start.build_merge", made)
    path = config_file.with_name("solar.yml")
    path.write_text(SOLAR)
    return path


@pytest.mark.slow
def test_mergekit_makes_the_start_that_a_recipe_describes(config, config_file, wanted, tmp_path) -> None:
    (tmp_path / "solar.yml").write_text(SOLAR)
    start = merged_start(config, wanted(init=str(tmp_path / "solar.yml"), full=True))
    assert start is not None
    folder = start.folder(config, tmp_path / "cache", lambda stage: None)
    assert folder.name == start.digest(config, tmp_path / "cache")
    base = AutoModelForCausalLM.from_pretrained(config.models["llama"].path)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.config.num_hidden_layers == 3
    twice, once = merged.model.layers, base.model.layers
    for ours, theirs in zip(twice, (once[0], once[1], once[1]), strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)


def test_a_deeper_student_starts_as_the_recipes_merge_and_is_trained_on(config, wanted, recipe, tmp_path) -> None:
    taught = wanted(init=str(recipe), full=True, clm=1, epochs=8, learning_rate=0.001)
    card = distill(config, taught, tmp_path / "all", Quiet())
    assert card.after.bits_per_byte < card.before.bits_per_byte
    assert card.start == "the passthrough merge of `llama` (`solar.yml`)"
    assert card.settings["init"] == "solar.yml"
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    assert student.config.num_hidden_layers == 3
    assert "started from the passthrough merge of `llama`" in (tmp_path / "all" / "README.md").read_text()
    assert f"{{all: {{path: {tmp_path / 'all'}}}}}" in list(report_lines(card, tmp_path / "all"))[-1]
    listener = Quiet()
    again = distill(config, taught, tmp_path / "all", listener)
    assert again == card and listener.stages == []


def test_an_adapter_on_a_recipes_merge_has_it_in_its_folder_and_is_served(
    config_file, config, wanted, recipe, tmp_path
) -> None:
    out = tmp_path / "all"
    card = distill(config, wanted(init=str(recipe), steps=2), out, Quiet())
    assert card.start_folder == "start"
    told = list(report_lines(card, out))[-1]
    assert f"{{all-start: {{path: {out / 'start'}}}, all: {{base: all-start, adapter: {out}}}}}" in told
    more = f"  all-start: {{path: {out / 'start'}}}\n  all: {{base: all-start, adapter: {out}}}\n"
    config_file.write_text(config_file.read_text() + more)
    from ensemble_server.server.rehearsal import rehearse

    served = load_config(config_file)
    rehearse(served).check(served)


def test_a_folder_of_a_merged_model_is_a_start_too(tiny, config, wanted, tmp_path) -> None:
    """`deep` stands for what `ensemble merge` has written. The first figures are its own."""
    folder = tmp_path / "merged"
    folder.symlink_to(tiny["deep"])
    card = distill(config, wanted(init=str(folder), steps=1), tmp_path / "all", Quiet())
    full = distill(config, wanted(init=str(folder), full=True, steps=1, learning_rate=1e-9), tmp_path / "full", Quiet())
    as_model = distill(config, wanted(student="deep", full=True, steps=1), tmp_path / "other", Quiet())
    assert card.before == full.before == as_model.before
    assert card.start_folder == str(folder) and full.start_folder is None
    assert Card.load(tmp_path / "all") == card


def test_what_is_no_start_is_refused_by_name(config, wanted, tmp_path) -> None:
    other = make_model(tmp_path / "other", extra=("<tool>",))
    empty = tmp_path / "empty"
    empty.mkdir()
    for init, message in {
        str(tmp_path / "none.yml"): "there is no file or folder .*none.yml",
        str(empty): "holds no config.json",
        str(other): "has other tokens than 'llama'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            distill(config, wanted(init=init, steps=1), tmp_path / "all", Quiet())


def test_an_arms_adapter_on_a_merge_is_refused_before_anything_is_read(config, wanted, recipe) -> None:
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"init solar\.yml is a merge, .* give `full: true`"):
        distilled_entry(config, wanted(init=str(recipe)), told.append)
    assert told == []


def test_a_path_of_a_plan_starts_at_its_folder(tmp_path: Path) -> None:
    settings = {"ensemble": "mix", "student": "llama", "text": ["a.txt"]}
    found = Distillation.model_validate(settings | {"init": "merges/solar.yml"}, context={"folder": tmp_path})
    assert found.init_path == tmp_path / "merges" / "solar.yml"
    assert Distillation.model_validate(settings | {"init": "red"}, context={"folder": tmp_path}).init_path is None
