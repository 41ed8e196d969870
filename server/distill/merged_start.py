"""A start that is a merge: mergekit's recipe, made and kept as those of comparisons are, or the folder of one.

Depth up-scaling is the case in point: a model's layers are stacked twice, but for the last of one copy and the first of
the other, and the whole is trained on (Kim et al., SOLAR, 2023, https://arxiv.org/abs/2312.15166).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.kept.content_cache import folder_digest
from ensemble_server.server.compare.merges.merging import build_merge, check_recipe, plan_build
from ensemble_server.server.compare.merges.recipes import Recipe
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.weights.quantisation import quantisation_of
from ensemble_server.server.weights.tokenizer import Vocabulary, load_tokenizer


@dataclass(frozen=True)
class MergedStart:
    """`path`: of the recipe, or of the model's folder, which has no `recipe`."""

    path: Path
    recipe: Recipe | None

    @property
    def told(self) -> str:
        """For a card."""
        if self.recipe is None:
            return f"the model in `{self.path.name}`"
        names = ", ".join(f"`{reference.written}`" for reference in self.recipe.references)
        return f"the {self.recipe.method} merge of {names} (`{self.path.name}`)"

    def digest(self, config: Config, cache: Path) -> str:
        """Of all that decides its weights."""
        if self.recipe is None:
            return folder_digest(self.path)
        return plan_build(self.recipe, config, cache).merge.target.name

    def folder(self, config: Config, cache: Path, on_stage: Callable[[str], None]) -> Path:
        """Where the weights lie; a recipe's are made if the cache lacks them. Raises what `build_merge` raises."""
        return self.path if self.recipe is None else build_merge(self.path, config, cache, on_stage=on_stage)


def merged_start(config: Config, wanted: Distillation) -> MergedStart | None:
    """None if `init` names no merge. Looks at no weights. Raises `ConfigError` for what is no merge."""
    path = wanted.init_path
    if path is None or wanted.init in config.models:
        return None
    if not path.exists():
        raise ConfigError(
            f"init: there is no file or folder {path}; give a recipe of mergekit, the folder of a model, or a name"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"init: {path} holds no config.json; give the folder of a whole model, or a recipe")
        if quantisation_of(path) is not None:
            raise ConfigError(f"init: {path} is quantised and cannot be trained; take its unquantised weights")
        return MergedStart(path, None)
    recipe = check_recipe(path, config)
    if recipe.makes_own_tokenizer:
        raise ConfigError(
            f"init: {path} makes a vocabulary of its own, and a student reads as {wanted.student!r} does; merge it "
            "first (`ensemble merge`), and name the result in the config as the student"
        )
    return MergedStart(path, recipe)


def check_tokens(folder: Path, token_ids: Mapping[str, int], student: str) -> None:
    """Raises `ConfigError` unless a merge has the tokens of the student that starts there."""
    if Vocabulary(load_tokenizer(folder)).token_ids != token_ids:
        raise ConfigError(
            f"init: {folder} has other tokens than {student!r}; name it in the config, and take it as the student"
        )
