"""What is written down of mergekit, against mergekit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from ensemble_server.server.compare.merges import recipe_blocks
from ensemble_server.server.compare.merges.methods import METHODS
from ensemble_server.server.compare.merges.references import parse_reference
from tests.thinned import first_fast

IN_A_FRESH_PROCESS = """
import sys
from ensemble_server.server.cli.app import main
sys.argv = ["ensemble", "merge", *sys.argv[1:]]
try:
    main()
except SystemExit as exc:
    code = exc.code
print(code, sorted({"torch", "transformers", "mergekit"} & set(sys.modules)))
"""


def test_methods_are_those_that_mergekit_has_and_widen() -> None:
    from mergekit.merge_methods.registry import registered_methods

    theirs = {method.spec.name: method.spec for method in registered_methods() if method.spec.name != "widen"}
    assert METHODS.keys() - {"widen"} == theirs.keys()
    for name, spec in theirs.items():
        ours = METHODS[name]
        assert set(ours.parameters) == {parameter.name for parameter in spec.parameters}, name
        assert (ours.base == "required") == (spec.contract.base == "required"), name
        per_model = {parameter.name for parameter in spec.parameters if parameter.scope != "shared"}
        assert per_model == set(ours.parameters) & ours.per_model, name
        assert set(ours.tried) <= set(ours.parameters), name
        if ours.base == "required":
            most = None if spec.contract.max_inputs is None else spec.contract.max_inputs - 1
            assert ours.num_models == (max(spec.contract.min_inputs - 1, 0), most), name


def required(block: type[BaseModel]) -> set[str]:
    return {name for name, field in block.model_fields.items() if field.is_required()}


def test_blocks_have_the_keys_of_mergekits() -> None:
    from mergekit import config
    from mergekit.moe.config import Expert, MoEMergeConfig
    from mergekit.tokenizer.config import TokenEmbeddingConfig, TokenizerConfig

    pairs = {
        recipe_blocks.MergeBlock: config.MergeConfiguration,
        recipe_blocks.OutputModule: config.OutputModuleDefinition,
        recipe_blocks.OutputSlice: config.OutputSliceDefinition,
        recipe_blocks.InputSlice: config.InputSliceDefinition,
        recipe_blocks.InputModel: config.InputModelDefinition,
        recipe_blocks.Conditional: config.ConditionalParameter,
        recipe_blocks.Tokenizer: TokenizerConfig,
        recipe_blocks.EmbeddingOfToken: TokenEmbeddingConfig,
        recipe_blocks.MoeBlock: MoEMergeConfig,
        recipe_blocks.Expert: Expert,
    }
    for ours, theirs in pairs.items():
        assert ours.model_fields.keys() == theirs.model_fields.keys(), ours
        required = [
            {name for name, field in block.model_fields.items() if field.is_required()} for block in (ours, theirs)
        ]
        assert required[0] == required[1], ours


@pytest.mark.parametrize(
    "value", ["a", "org/a@main", "a+b", "a@c+b", {"model": "a"}, {"model": {"path": "a", "revision": "r"}, "lora": "b"}]
)
def test_references_are_read_as_mergekit_reads_them(value) -> None:
    from mergekit.common import ModelReference

    ours, theirs = parse_reference(value), ModelReference.model_validate(value)
    assert (ours.path, ours.revision) == (theirs.model.path, theirs.model.revision)
    assert ours.lora == (theirs.lora and theirs.lora.path)
    assert ours.architecture == theirs.override_architecture


@pytest.mark.parametrize("value", [1, None, "a+b+c", "a@b@c", {"path": "a"}, "a+b@c"])
def test_what_is_no_model_is_refused(value) -> None:
    with pytest.raises(ValueError, match=r"is no model|revision of a LoRA"):
        parse_reference(value)


@pytest.mark.parametrize(
    ("recipe", "told"),
    first_fast(
        [
            ("merge_method: tie\nmodels: [{model: base}]", "there is no method 'tie'; did you mean 'ties'?"),
            ("merge_method: linear\nmodels: [{model: base, parameters: {wait: 1}}]", "unknown parameter"),
            ("merge_method: slerp\nbase_model: base\nmodels: [{model: base}]", "slerp takes 1 beside the base, got 0"),
            ("merge_method: ties\nmodels: [{model: base}]", "base_model: ties needs one"),
            ("merge_method: linear\ndtype: float23\nmodels: [{model: base}]", "there is no dtype 'float23'"),
            ("merge_method: linear\nmodels: [{model: a+b+c}]", "is no model"),
            ("merge_method: [ties]\nmodels: [{model: base}]", "there is no method ['ties']"),
        ]
    ),
)
def test_a_wrong_recipe_is_refused_before_torch_is_imported(tmp_path: Path, recipe: str, told: str) -> None:
    (tmp_path / "recipe.yml").write_text(recipe, encoding="utf-8")
    (tmp_path / "config.yaml").write_text("models: {base: {path: nowhere}}", encoding="utf-8")
    command = ["recipe.yml", "--config", "config.yaml", "--out", "merged"]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert told in done.stderr
    assert done.stdout.splitlines()[-1] in ("1 []", "2 []")
