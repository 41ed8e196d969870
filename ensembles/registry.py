"""The menu of methods. A new one is a new file, a row here, a config, a test file and a page of docs."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.method import Method

METHODS: dict[str, str] = {
    "probability_average": "ensemble_server.ensembles.probability_averaging:ProbabilityAverage",
    "crowd_vote": "ensemble_server.ensembles.crowd_vote:CrowdVote",
    "majority": "ensemble_server.ensembles.majority:Majority",
    "ranking": "ensemble_server.ensembles.ranking:Ranking",
    "exchange_of_thought": "ensemble_server.ensembles.exchange_of_thought:ExchangeOfThought",
    "answer_fusion": "ensemble_server.ensembles.answer_fusion:AnswerFusion",
    "routing": "ensemble_server.ensembles.routing:Routing",
}


def method_class(name: str) -> type[Method]:
    """The class behind a method's name. Raises `ConfigError` with the nearest known name if there is none."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown method {name!r}{hint} (known: {', '.join(sorted(METHODS))})")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
