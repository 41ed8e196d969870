"""`choose: auto` and `choose: {density: [0.2, 0.5]}`: an arm's settings written out as the variants that are tried.

    {name: ties, merge: ties.yml, choose: auto}
    {name: sum, merge: sum.yml, choose: {weight: [0.3, 0.6, {code: 0.6, prose: 0.3}]}}
    {name: posterior, ensemble: {...}, choose: {share: [0.003, 0.03]}}

Every combination of the values is a variant, and the best on `fit` becomes the arm, as with variants written by hand.
Of a merge the names are those of mergekit's parameters: a value takes the place of whatever the recipe says of it; a
map gives each model its own. `auto` tries what `server.compare.merges.methods` lists for the method, and the recipe as
it is written. Of an ensemble the names are the keys of its entry.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.merges.methods import METHODS
from ensemble_server.server.compare.merges.recipes import Recipe, read_recipe
from ensemble_server.server.compare.merges.references import Reference, parse_reference
from ensemble_server.server.compare.planning.blocks import Arm, Variant
from ensemble_server.server.config.problems import nearest

MAX_VARIANTS = 32
EMPHASIS = 2  # times the weight of the others
AS_WRITTEN = "as written"

Settings = Mapping[str, Any]


def written_out(arm: Arm, folder: Path, names: Collection[str]) -> Arm:
    """The arm with its variants in `choose`; itself if they are written by hand, or there are none.

    `folder`: the plan's; `names`: the config's models. Raises `ConfigError` for settings that cannot be chosen, and for
    a recipe that cannot be read.
    """
    if not isinstance(arm.choose, tuple):
        variants = tuple(_of_ensemble(arm) if arm.merge is None else _of_merge(arm, folder, names))
        if len(variants) > MAX_VARIANTS:
            raise ConfigError(
                f"choose: makes {len(variants)} variants; at most {MAX_VARIANTS} are tried, give fewer values"
            )
        if len(variants) > 1:
            return arm.model_copy(update={"merge": None, "ensemble": None, "choose": variants})
        if find_spec("mergekit") is not None or arm.merge is None:
            raise ConfigError("choose: leaves one variant; give several values of a setting")
    return arm


def _of_ensemble(arm: Arm) -> Iterator[Variant]:
    if not isinstance(arm.choose, Mapping):
        raise ConfigError(
            "choose: auto belongs to a `merge`; of an ensemble name the values, such as choose: {share: [0.003, 0.03]} "
            "(and `share: auto` needs no choice)"
        )
    for settings in _combinations(arm.choose):
        yield Variant(label=_label(settings), ensemble={**(arm.ensemble or {}), **settings})


def _of_merge(arm: Arm, folder: Path, names: Collection[str]) -> Iterator[Variant]:
    if find_spec("mergekit") is None:
        return  # then the arm fails to build, and says what to install
    assert arm.merge is not None, "asked of merges alone"
    is_file = isinstance(arm.merge, str)
    recipe = read_recipe(Path(arm.merge) if isinstance(arm.merge, str) else arm.merge, folder=folder)
    data = recipe.with_models(lambda reference: _from_anywhere(reference, recipe, names)) if is_file else recipe.data
    method = METHODS.get(recipe.method)
    known = method.parameters if method is not None else ()
    if isinstance(arm.choose, Mapping):
        if unknown := [name for name in arm.choose if name not in known]:
            raise ConfigError(f"choose: {recipe.method} has no parameter {unknown[0]!r}{nearest(unknown[0], known)}")
        tried = _combinations(arm.choose)
    else:
        tried = _tried(recipe)
        if not tried:
            raise ConfigError(f"choose: {recipe.method} has no setting to choose; leave it out")
    made = {_label(settings): _with_settings(data, recipe, settings) for settings in tried}
    if arm.choose == "auto" and dict(data) not in made.values():
        yield Variant(label=AS_WRITTEN, merge=dict(data))
    for label, changed in made.items():
        yield Variant(label=label, merge=changed)


def _tried(recipe: Recipe) -> list[Settings]:
    """What `auto` tries of a recipe's method, besides the recipe as it is."""
    method = METHODS.get(recipe.method)
    if method is None:
        return []
    settings = _combinations({name: list(values) for name, values in method.tried.items()}) if method.tried else []
    models = [reference.written for reference in _merged_models(recipe)]
    if method.tries_emphasis and len(models) > 1:
        settings += [{"weight": {name: EMPHASIS if name == one else 1 for name in models}} for one in models]
    return settings


def _merged_models(recipe: Recipe) -> list[Reference]:
    """The models that enter with settings of their own: all but a base that the others differ from."""
    method, base = METHODS[recipe.method], recipe.data.get("base_model")
    base_name = None if base is None or method.base == "ignored" else parse_reference(base).written
    entries = [parse_reference(entry["model"]) for entry in _inputs(recipe.data)]
    return [one for one in {entry.written: entry for entry in entries}.values() if one.written != base_name]


def _combinations(values: Mapping[str, Sequence[Any]]) -> list[Settings]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def _label(settings: Settings) -> str:
    """{"density": 0.2, "weight": {"code": 2}} -> "density 0.2, weight code 2" """

    def said(value: Any) -> str:
        if isinstance(value, Mapping):
            return " ".join(f"{name} {one}" for name, one in value.items())
        return str(value)

    return ", ".join(f"{name} {said(value)}" for name, value in settings.items())


def _with_settings(data: Mapping[str, Any], recipe: Recipe, settings: Settings) -> dict[str, Any]:
    changed = deepcopy(dict(data))
    for name, value in settings.items():
        _set(changed, recipe, name, value)
    return changed


def _set(data: dict[str, Any], recipe: Recipe, name: str, value: Any) -> None:
    """Wherever the recipe has the parameter; else where the method looks for it. `data` is changed."""
    inputs = list(zip(_inputs(data), _inputs(recipe.data), strict=True))
    merged = {reference.written for reference in _merged_models(recipe)}
    own = [
        (entry, written) for entry, source in inputs if (written := parse_reference(source["model"]).written) in merged
    ]
    if isinstance(value, Mapping):
        for place in _places(data, name):
            del place[name]
        for entry, written in own:
            if written not in value:
                raise ConfigError(f"choose.{name}: gives no value for {written!r}")
            entry["parameters"] = {**(entry.get("parameters") or {}), name: value[written]}
    elif places := list(_places(data, name)):
        for place in places:
            place[name] = value
    elif name in METHODS[recipe.method].per_model:
        for entry, _ in own:
            entry["parameters"] = {**(entry.get("parameters") or {}), name: value}
    else:
        data["parameters"] = {**(data.get("parameters") or {}), name: value}


def _inputs(data: Any) -> Iterator[dict[str, Any]]:
    """The maps of a recipe that name a model to be merged, of `models` and of the `sources` of slices."""
    if isinstance(data, list):
        for item in data:
            yield from _inputs(item)
    elif isinstance(data, dict):
        if "model" in data:
            yield data
        else:
            for key, item in data.items():
                if key not in ("parameters", "tokenizer", "base_model"):
                    yield from _inputs(item)


def _places(data: Any, name: str) -> Iterator[dict[str, Any]]:
    """The `parameters` maps that hold a parameter."""
    if isinstance(data, list):
        for item in data:
            yield from _places(item, name)
    elif isinstance(data, dict):
        for key, item in data.items():
            if key == "parameters" and isinstance(item, dict):
                if name in item:
                    yield item
            elif key != "tokenizer":
                yield from _places(item, name)


def _from_anywhere(reference: Reference, recipe: Recipe, names: Collection[str]) -> str:
    """As the recipe writes it, but folders beside the recipe by their whole path: a variant has no folder itself."""
    if reference.written in names or reference.path in names:
        path = reference.path
    else:
        path = _whole(reference.path, recipe.folder)
    revision = "" if reference.revision is None else f"@{reference.revision}"
    lora = "" if reference.lora is None else f"+{_whole(reference.lora, recipe.folder)}"
    return f"{path}{revision}{lora}"


def _whole(path: str, folder: Path) -> str:
    there = folder / Path(path).expanduser()
    return str(there) if there.exists() else path
