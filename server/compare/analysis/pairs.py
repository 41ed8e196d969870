"""Every arm against every other one: differences for any baseline, without measuring anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

from ensemble_server.ensembles.comparison.intervals import Estimate
from ensemble_server.ensembles.comparison.paired import Comparison
from ensemble_server.server.compare.analysis.pairing import Counted, Rules, Unadjusted, adjusted, comparisons
from ensemble_server.server.compare.kept.pairs import Pairs
from ensemble_server.server.compare.kept.records import ArmRecord

MAX_ARMS = 24  # of more, only the plan's baseline is looked at: pairs grow with their square
MAX_RESAMPLES = 2000  # for pairs without the plan's baseline


def all_pairs(records: Mapping[str, ArmRecord], baseline: str, counted: Counted, rules: Rules) -> Pairs:
    """For every arm but `baseline` as the baseline: the differences of all others, adjusted over them. Each pair is
    compared once; seen from the other side it is the same with its sign turned."""
    fewer = replace(rules, num_resamples=min(rules.num_resamples, MAX_RESAMPLES))
    if len(records) > MAX_ARMS:
        return Pairs(num_resamples=fewer.num_resamples)
    families: dict[str, dict[str, dict[str, Unadjusted]]] = {name: {} for name in records}
    for one, other in combinations(records, 2):
        used = rules if baseline in (one, other) else fewer
        for measure, found in comparisons(records[one], records[other], counted, used):
            families[other].setdefault(measure, {})[one] = found
            families[one].setdefault(measure, {})[other] = _turned(found)
    return Pairs(
        num_resamples=fewer.num_resamples,
        of={
            name: {measure: adjusted(family, rules) for measure, family in of_measures.items()}
            for name, of_measures in families.items()
            if name != baseline and of_measures
        },
    )


def _turned(found: Unadjusted) -> Unadjusted:
    compared = found.comparison
    turned: Comparison = replace(
        compared,
        difference=_negative(compared.difference),
        effect_size=-compared.effect_size,
        wins=compared.losses,
        losses=compared.wins,
        mcnemar=None,
        odds=None,
    )
    return replace(found, comparison=turned)


def _negative(estimate: Estimate) -> Estimate:
    interval = estimate.interval
    if interval is not None:
        interval = replace(interval, low=-interval.high, high=-interval.low)
    return replace(estimate, value=-estimate.value, interval=interval)
