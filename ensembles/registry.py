"""The menu of methods. A new one is a new file, a row here, a config, a test file and a page of docs.

Other packages add theirs by entry points of the group `ensemble_server.methods`, a name and a class:

    [project.entry-points."ensemble_server.methods"]
    first_to_answer = "my_package.first_to_answer:FirstToAnswer"

Names of this package are never replaced. See docs/writing-a-method.md.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.method import Method, MethodConfig

ENTRY_POINTS = "ensemble_server.methods"

METHODS: dict[str, str] = {
    "probability_average": "ensemble_server.ensembles.probability_averaging:ProbabilityAverage",
    "crowd_vote": "ensemble_server.ensembles.crowd_vote:CrowdVote",
    "majority": "ensemble_server.ensembles.majority:Majority",
    "ranking": "ensemble_server.ensembles.ranking:Ranking",
    "exchange_of_thought": "ensemble_server.ensembles.exchange_of_thought:ExchangeOfThought",
    "self_correction": "ensemble_server.ensembles.self_correction:SelfCorrection",
    "answer_fusion": "ensemble_server.ensembles.answer_fusion:AnswerFusion",
    "routing": "ensemble_server.ensembles.routing:Routing",
}


def method_class(name: str) -> type[Method]:
    """The class behind a method's name, this package's or another's.

    Raises `ConfigError` with the nearest known name if there is none, and if another package's cannot be loaded.
    """
    if name in METHODS:
        module, _, attribute = METHODS[name].partition(":")
        return getattr(import_module(module), attribute)
    added = list(entry_points(group=ENTRY_POINTS, name=name))
    if not added:
        known = sorted({*METHODS, *(point.name for point in entry_points(group=ENTRY_POINTS))})
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown method {name!r}{hint} (known: {', '.join(known)})")
    if len({point.value for point in added}) > 1:
        packages = " and ".join(sorted(_package(point) for point in added))
        raise ConfigError(f"method {name!r} is added by {packages}; uninstall all but one of them")
    return _loaded(added[0])


def _loaded(point: EntryPoint) -> type[Method]:
    """The class of another package. Whatever its import raises is its own fault, and told as such."""
    origin = f"method {point.name!r} of {_package(point)}"
    try:
        cls = point.load()
    except Exception as exc:
        raise ConfigError(f"{origin} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"{origin} ({point.value}) must be a class derived from Method, got {cls!r}")
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise ConfigError(f"{origin} ({point.value}) must have a class Config derived from MethodConfig")
    return cls


def _package(point: EntryPoint) -> str:
    return f"package {point.dist.name!r}" if point.dist is not None else f"{point.value!r}"
