"""mergekit's YAML, read strictly: which weights it names, and whether mergekit would understand it.

Two kinds: a merge (`merge_method`) and a mixture of experts (`experts`, the file of mergekit-moe). Where mergekit wants
a model there may also stand the name of a hosted model. mergekit reads over what it does not know; here a key that no
block has, and a parameter that no method has, is an error. A parameter that only another method has is read over, as
published recipes often carry one.

Neither mergekit nor torch is imported: a wrong recipe is refused at once.

Format: https://github.com/arcee-ai/mergekit/blob/main/README.md, .../docs/moe.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.merges.methods import METHODS
from ensemble_server.server.compare.merges.recipe_blocks import MergeBlock, MoeBlock
from ensemble_server.server.compare.merges.references import Reference, parse_reference
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.config.strict_yaml import read_yaml

WITHOUT_EFFECT = frozenset({"int8_mask"})  # on what comes out; recipes have it out of habit
_MODEL_KEYS = {"model", "base_model", "source_model"}
_NAMES_OF_KINDS = {"union", "base"}  # where a tokenizer is asked for, these are no models
_EXTRA_TOP_LEVEL_KEYS = {"name"}  # mergekit-multi's; says nothing about the weights


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `data`: the YAML's value; `folder`: where its relative paths start; `source`: for messages."""

    data: Mapping[str, Any]
    folder: Path
    source: str
    kind: Literal["merge", "moe"]
    references: tuple[Reference, ...]  # each once, the one whose tokenizer and settings the result takes first

    @property
    def method(self) -> str:
        return str(self.data["merge_method"]) if self.kind == "merge" else "moe"

    @property
    def makes_own_tokenizer(self) -> bool:
        """Whether the result's vocabulary may differ from its first model's."""
        return any(self.data.get(key) is not None for key in ("tokenizer", "tokenizer_source"))

    def with_models(self, name_of: Callable[[Reference], str]) -> dict[str, Any]:
        """`data` with every reference to a model replaced by what `name_of` gives for it."""

        def replaced(value: Any) -> Any:
            reference = _reference(value)
            name = name_of(reference)
            if reference.architecture is None:
                return name
            return {"model": {"path": name}, "override_architecture": reference.architecture}

        return _mapped(dict(self.data), replaced)


def read_recipe(recipe: Mapping[str, Any] | Path, *, folder: Path) -> Recipe:
    """The recipe in a YAML file, or its value as it stands inside another file of `folder`.

    Raises `ConfigError` that lists every problem, or says how to install mergekit. Looks at no weights.
    """
    require_mergekit()
    if isinstance(recipe, Path):
        data, problems = read_yaml(recipe)
        source, folder = str(recipe), recipe.absolute().parent
    else:
        data, problems, source = recipe, [], "merge"
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: must be a map of mergekit's keys such as merge_method, got {type(data).__name__}")

    kind: Literal["merge", "moe"] = "moe" if "experts" in data and "merge_method" not in data else "merge"
    problems += _problems(data, kind)
    if problems:
        lines = "\n  - ".join(["", *problems])
        raise ConfigError(f"{source}: {problems[0]}" if len(problems) == 1 else f"{source}: several problems{lines}")
    return Recipe(data, folder, source, kind, _references(data))


def require_mergekit() -> None:
    """Raises `ConfigError` unless mergekit can be imported."""
    if find_spec("mergekit") is None:
        raise ConfigError(
            "weight merges are made by mergekit, which is not installed; run: pip install 'ensemble-server[compare]'"
        )


def _problems(data: dict[str, Any], kind: Literal["merge", "moe"]) -> list[str]:
    block: type[BaseModel] = MergeBlock if kind == "merge" else MoeBlock
    known = {key: value for key, value in data.items() if key not in _EXTRA_TOP_LEVEL_KEYS}
    problems = list(_unknown_keys(block, known, ""))
    if kind == "merge":
        problems += _method_problems(data)
    try:
        block.model_validate(data)
    except ValidationError as exc:
        return problems + [
            f"{'.'.join(map(str, found['loc'])) or 'recipe'}: {found['msg'].removeprefix('Value error, ')}"
            for found in exc.errors(include_url=False, include_input=False)
            if found["loc"] != ("merge_method",)  # said above
        ]
    return problems + (list(_count_problems(data)) if kind == "merge" else [])


def _method_problems(data: dict[str, Any]) -> Iterator[str]:
    method = data.get("merge_method")
    if method is None:
        yield "needs `merge_method` (a merge) or `experts` (a mixture of experts)"
    elif not isinstance(method, str) or method not in METHODS:
        yield f"merge_method: there is no method {method!r}{nearest(str(method), list(METHODS))}"
    parameters = {name for known in METHODS.values() for name in known.parameters}
    own = METHODS[method].parameters if isinstance(method, str) and method in METHODS else tuple(parameters)
    for at, name in _parameter_names(data, ""):
        if name not in parameters:
            yield f"unknown parameter {f'{at}.{name}'!r}{nearest(name, parameters)}"
        elif name not in own and name not in WITHOUT_EFFECT:
            takes = f"it takes {', '.join(own)}" if own else "it takes none"
            yield f"{at}.{name}: {method} has no such parameter, and would read over it; {takes}"


def _count_problems(data: dict[str, Any]) -> Iterator[str]:
    """A base that is missing, and models too few or too many; of recipes with slices or modules mergekit says it."""
    name, models = str(data.get("merge_method")), data.get("models")
    if not models or name not in METHODS:
        return
    method = METHODS[name]
    base = data.get("base_model")
    if method.base == "required" and base is None:
        yield f"base_model: {name} needs one, the model from which the others differ"
        return
    written = {parse_reference(entry["model"]).written for entry in models}
    others = len(written - ({parse_reference(base).written} if base is not None else set()))
    least, most = method.num_models
    if others < least or (most is not None and others > most):
        wanted = str(least) if least == most else f"at least {least}" if others < least else f"at most {most}"
        yield f"models: {name} takes {wanted} beside the base, got {others}"


def _parameter_names(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Where a `parameters` map stands, and each name in it."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _parameter_names(item, f"{at}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            below = f"{at}.{key}".lstrip(".")
            if key == "parameters" and isinstance(item, dict):
                yield from ((below, str(name)) for name in item)
            elif key != "tokenizer":
                yield from _parameter_names(item, below)


def _unknown_keys(block: type[BaseModel], value: Any, at: str) -> Iterator[str]:
    """Keys of `value` that neither `block` nor the blocks in it have. References may be maps, too: not looked into."""
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        path = f"{at}.{key}".lstrip(".")
        if key not in block.model_fields:
            yield f"unknown key {path!r}{nearest(str(key), block.model_fields)}"
            continue
        if key in _MODEL_KEYS or key in {"parameters", "tokenizer", "tokenizer_source"}:
            continue
        for inner in _blocks_in(block.model_fields[key].annotation):
            entries = (
                item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else iter(())
            )
            for name, entry in entries:
                yield from _unknown_keys(inner, entry, f"{path}.{name}")


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for argument in get_args(annotation) for block in _blocks_in(argument)]


# --- references ---


def _references(data: dict[str, Any]) -> tuple[Reference, ...]:
    found: dict[str, Reference] = {}

    def note(value: Any) -> Any:
        reference = _reference(value)
        found.setdefault(reference.written, reference)
        return value

    _mapped(data, note)
    base = None if data.get("base_model") is None else _reference(data["base_model"]).written
    return tuple(sorted(found.values(), key=lambda reference: reference.written != base))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to all that stands where mergekit expects a model."""
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {}
    for key, item in value.items():
        if key == "parameters" or item is None:
            changed[key] = item
        elif key in _MODEL_KEYS:
            changed[key] = change(item)
        elif key == "tokenizer_source":
            changed[key] = item if item in _NAMES_OF_KINDS else change(item)
        elif key == "tokenizer":
            changed[key] = _mapped_tokenizer(item, change)
        else:
            changed[key] = _mapped(item, change)
    return changed


def _mapped_tokenizer(tokenizer: Any, change: Callable[[Any], Any]) -> Any:
    """The block `tokenizer`, where a model may be a whole source, one token's source, or inside that."""
    if not isinstance(tokenizer, dict):
        return tokenizer

    def source_of(value: Any) -> Any:
        if isinstance(value, dict) and "kind" in value:
            return {key: change(item) if key == "model" else item for key, item in value.items()}
        return value if value is None or value in _NAMES_OF_KINDS else change(value)

    changed = dict(tokenizer)
    if "source" in tokenizer:
        changed["source"] = source_of(tokenizer["source"])
    if isinstance(tokens := tokenizer.get("tokens"), dict):
        changed["tokens"] = {
            token: {key: source_of(item) if key == "source" else item for key, item in entry.items()}
            for token, entry in tokens.items()
        }
    return changed


def _reference(value: Any) -> Reference:
    try:
        return parse_reference(value)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
