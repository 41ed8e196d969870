"""What a report's verdicts, intervals and promises are worth, on simulated figures of known truth: before and after.

    python benchmarks/comparison_levels.py [TRIALS]

"Before" are the rules of earlier versions, written down here as formulas; "after" are the functions that reports are
made with. Each part prints a Markdown table: false verdicts where nothing differs (single items, clusters, many arms),
intervals over few clusters and of win rates, "no difference shown" where something does, power against what was
promised, documents of one text that resemble their neighbours, few documents, three seeds of training.
docs/statistics.md quotes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from scipy.special import bdtr, expit, stdtr, stdtrit

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.bradley_terry import bradley_terry, outcomes_of_scores
from ensemble_server.ensembles.comparison.dependence import design_effect, of_neighbours
from ensemble_server.ensembles.comparison.paired import compare_right_wrong, compare_scores
from ensemble_server.ensembles.comparison.power import OfMean, OfRightWrong
from ensemble_server.ensembles.comparison.proportions import tango
from ensemble_server.ensembles.comparison.replicates import crossed_ratio_difference
from ensemble_server.ensembles.comparison.significance import holm
from ensemble_server.ensembles.comparison.verdict import verdict

NUM_TRIALS = 1500
LEVEL = 0.95
ALPHA = 1 - LEVEL
FEW_RESAMPLES = 100  # where the bootstrap's standard error plays no part


def table(*heads: str) -> None:
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --- right and wrong ---------------------------------------------------------------------------------------------


def mcnemar_p(only_model: np.ndarray, only_baseline: np.ndarray) -> np.ndarray:
    """Exact and two-sided, for arrays of counts."""
    divided = only_model + only_baseline
    return np.minimum(1.0, 2 * bdtr(np.minimum(only_model, only_baseline), divided, 0.5))


def print_false_verdicts(num_trials: int) -> None:
    """Two models that are equally good on 200 questions, each better on half of the passages (.8 against .4)."""
    table("questions on one passage", "before: single questions", "after: `cluster`")
    for size in (1, 5, 10):
        rng = np.random.default_rng(size)
        clusters = [str(index // size) for index in range(200)]
        false = np.zeros(2)
        for _ in range(num_trials):
            sign = np.repeat(rng.integers(2, size=200 // size) * 2 - 1, size)
            model, baseline = (1.0 * (rng.random(200) < 0.6 + side * 0.2 * sign) for side in (1, -1))
            only_model, only_baseline = (model > baseline).sum(), (model < baseline).sum()
            found = compare_right_wrong(model, baseline, clusters=clusters, num_resamples=FEW_RESAMPLES)
            said = verdict(found.difference.interval, margin=0.0, higher_is_better=True, adjusted_p_value=found.p_value)
            false += bool(mcnemar_p(only_model, only_baseline) <= ALPHA), said in ("better", "worse")
        row(size, *map(percent, false / num_trials))


def print_few_clusters(num_trials: int) -> None:
    """The same with 200 questions on few passages, which lean by a normal distribution: does the interval hold 0?"""
    table("passages", "before: normal tails", "after: Student's tails")
    for num_clusters in (3, 5, 10, 20):
        rng = np.random.default_rng(num_clusters)
        clusters = np.arange(200) * num_clusters // 200
        holds = np.zeros(2)
        for _ in range(num_trials):
            lean = rng.normal(0, 0.15, num_clusters)[clusters]
            model, baseline = (1.0 * (rng.random(200) < np.clip(0.6 + side * lean, 0, 1)) for side in (1, -1))
            effect = design_effect(model - baseline, clusters.tolist())
            only = (model > baseline).sum() / effect, (model < baseline).sum() / effect
            tails = None, num_clusters - 1
            holds += [0 in tango(*only, 200 / effect, level=LEVEL, freedom=freedom) for freedom in tails]
        row(num_clusters, *map(percent, holds / num_trials))


def print_win_rates(num_trials: int) -> None:
    """Bradley and Terry's strength of the better of two models: does its interval hold the truth, and is it a point?"""
    table("items", "wins of", "before: held", "a point", "after: held", "a point")
    num_trials = max(num_trials // 4, 50)
    for num_items in (5, 20, 100):
        for chance in (0.6, 0.95):
            rng = np.random.default_rng(num_items)
            truth = np.log(chance / (1 - chance)) / 2
            found = np.zeros(4)
            for _ in range(num_trials):
                won = 1.0 * (rng.random(num_items) < chance)
                after = bradley_terry(outcomes_of_scores(np.stack([won, 1 - won])))[0]
                assert after.interval is not None, "there are two items"
                drawn = rng.binomial(num_items, won.mean(), 400)
                error = two_strengths(drawn, num_items).std(ddof=1) * (num_items / (num_items - 1)) ** 0.5
                half = error * stdtrit(num_items - 1, (1 + LEVEL) / 2)
                found += abs(truth - after.log_strength) <= half, half < 1e-9, truth in after.interval, False
                found[3] += after.interval.high - after.interval.low < 1e-9
            row(num_items, percent(chance), *map(percent, found / num_trials))


def two_strengths(wins: np.ndarray, num_items: int) -> np.ndarray:
    """The first of two models' strengths, with half a win and half a loss against an average one; by bisection."""
    low, high = np.full(len(wins), -20.0), np.full(len(wins), 20.0)
    for _ in range(60):
        at = (low + high) / 2
        is_low = wins - num_items * expit(2 * at) + 0.5 - expit(at) > 0
        low, high = np.where(is_low, at, low), np.where(is_low, high, at)
    return (low + high) / 2


def print_false_equivalence(num_trials: int) -> None:
    """A model that is right on 5 of 100 questions more, and "no difference shown" within a margin of 2."""
    table("questions", "before: bootstrap", "after: Tango's interval")
    for num_items in (6, 20, 30):
        rng = np.random.default_rng(num_items)
        false = np.zeros(2)
        for _ in range(num_trials):
            model, baseline = 1.0 * (rng.random(num_items) < 0.05), np.zeros(num_items)
            # Before: one discordant question takes the bootstrap's interval beyond 2 points, unless there are many.
            share = model.mean()
            error = np.sqrt(share * (1 - share) / num_items)
            false[0] += share + 1.96 * error <= 0.02
            found = compare_right_wrong(model, baseline, num_resamples=FEW_RESAMPLES)
            false[1] += (
                verdict(found.difference.interval, margin=0.02, higher_is_better=True, adjusted_p_value=found.p_value)
                == "no difference shown"
            )
        row(num_items, *map(percent, false / num_trials))


def print_power(num_trials: int) -> None:
    """The difference that is called detectable in four of five comparisons, and in how many it is found beside 19 arms
    that do not differ, after Holm's correction."""
    num_arms, divided = 20, 0.2
    table("items", "figures", "before: promised", "found", "after: promised", "found")
    for num_items in (20, 200):
        after = OfRightWrong(num_items, divided * num_items).detectable(alpha=ALPHA, num_comparisons=num_arms)
        cells: list[str] = []
        for promised in (2.80 * np.sqrt(divided / num_items), after):
            assert promised is not None, "so many items can show something"

            def counts(rng: np.random.Generator, gain: np.ndarray, num_items: int = num_items) -> np.ndarray:
                share = np.maximum(divided, gain)
                both = rng.binomial(num_items, share)
                ours = rng.binomial(both, (share + gain) / 2 / share)
                return mcnemar_p(ours, both - ours)

            cells += [f"{100 * promised:.1f} points", percent(found_share(counts, promised, num_arms, num_trials))]
        row(num_items, f"right or wrong, {divided:.0%} divided", *cells)
    for num_items in (10, 20, 200):
        error = 1 / np.sqrt(num_items)
        after = OfMean(error, num_items - 1).detectable(alpha=ALPHA, num_comparisons=num_arms)
        cells = []
        for promised in (2.80 * error, after):
            assert promised is not None, "Student's p has no smallest value"

            def students(rng: np.random.Generator, gain: np.ndarray, num_items: int = num_items) -> np.ndarray:
                values = rng.standard_normal((len(gain), num_items)) + gain[:, None]
                ratio = np.abs(values.mean(axis=1)) / (values.std(axis=1, ddof=1) / np.sqrt(num_items))
                return 2 * stdtr(num_items - 1, -ratio)

            cells += [f"{promised:.2f} sd", percent(found_share(students, promised, num_arms, num_trials))]
        row(num_items, "documents, Student's", *cells)


def found_share(
    p_values: Callable[[np.random.Generator, np.ndarray], np.ndarray], gain: float, num_arms: int, num_trials: int
) -> float:
    """How often the first of the arms, which alone differs, is significant after Holm's correction."""
    rng = np.random.default_rng(num_arms)
    gains = np.zeros(num_arms)
    gains[0] = gain
    return float(np.mean([holm(p_values(rng, gains).tolist())[0] <= ALPHA for _ in range(num_trials)]))


def print_families(num_trials: int) -> None:
    """20 arms of which none differs from the baseline: how often at least one is called better or worse."""
    table("items", "figures", "uncorrected", "as reported (Holm)")
    for num_items in (10, 40):
        rng = np.random.default_rng(num_items)
        for name, draw in (
            ("scores, sign flips", lambda rng, n: np.round(rng.standard_normal(n), 3)),
            ("right or wrong", None),
        ):
            false = np.zeros(2)
            for _ in range(num_trials // 5):
                p_values = []
                for _ in range(20):
                    if draw is None:
                        model, baseline = (1.0 * (rng.random(num_items) < 0.6) for _ in range(2))
                        found = compare_right_wrong(model, baseline, num_resamples=FEW_RESAMPLES)
                    else:
                        found = compare_scores(draw(rng, num_items), draw(rng, num_items), num_resamples=FEW_RESAMPLES)
                    p_values.append(found.p_value)
                false += min(p_values) <= ALPHA, min(holm(p_values)) <= ALPHA
            row(num_items, name, *map(percent, false / (num_trials // 5)))


# --- documents ---------------------------------------------------------------------------------------------------


def neighbours(rng: np.random.Generator, num_items: int, lag: float) -> np.ndarray:
    values = rng.standard_normal(num_items)
    for index in range(1, num_items):
        values[index] = lag * values[index - 1] + np.sqrt(1 - lag**2) * values[index]
    return values


def student_half(values: np.ndarray, *, by_lag: bool = False) -> float:
    num = len(values)
    plain = values.std(ddof=1) / np.sqrt(num) * float(stdtrit(num - 1, (1 + LEVEL) / 2))
    return plain * (of_neighbours(values).interval_factor(LEVEL) if by_lag else 1.0)


def in_blocks(values: np.ndarray) -> float:
    """Half of Student's interval over blocks of n^(1/3) neighbours."""
    num_blocks = len(values) // max(1, round(len(values) ** (1 / 3)))
    places = np.arange(len(values)) * num_blocks // len(values)
    sums = np.bincount(places, weights=values - values.mean())
    error = np.sqrt(float(sums @ sums) * num_blocks / (num_blocks - 1)) / len(values)
    return error * float(stdtrit(num_blocks - 1, (1 + LEVEL) / 2))


def print_neighbours(num_trials: int) -> None:
    table(
        "documents",
        "lag",
        "before: as independent",
        "in blocks of n^(1/3)",
        "after: by their lag",
        "width: median, 9 of 10 below",
    )
    for num_items in (10, 20, 50):
        for lag in (0.0, 0.4):
            rng = np.random.default_rng(num_items)
            hits, widths = np.zeros(3), []
            for _ in range(num_trials):
                values = neighbours(rng, num_items, lag)
                halves = (student_half(values), in_blocks(values), student_half(values, by_lag=True))
                hits += [abs(values.mean()) <= half for half in halves]
                widths.append(halves[2] / halves[0])
            median, high = np.quantile(widths, [0.5, 0.9])
            row(num_items, f"{lag:g}", *map(percent, hits / num_trials), f"{median:.2f}, {high:.2f} times")


def print_few_documents(num_trials: int) -> None:
    table("documents", "figures", "before: bootstrap", "after: Student's")
    kinds = {
        "normal": (0.0, lambda rng, num: rng.standard_normal(num)),
        "t, 3 degrees": (0.0, lambda rng, num: rng.standard_t(3, size=num)),
        "exponential": (1.0, lambda rng, num: rng.exponential(size=num)),
    }
    for num_items in (5, 12):
        for name, (truth, draw) in kinds.items():
            rng = np.random.default_rng(num_items)
            hits = np.zeros(2)
            for _ in range(num_trials):
                values = draw(rng, num_items)
                interval = bootstrap.mean(values, num_resamples=800).interval
                assert interval is not None, "there are several items"
                hits += [truth in interval, abs(values.mean() - truth) <= student_half(values)]
            row(num_items, name, *map(percent, hits / num_trials))


# --- replicates --------------------------------------------------------------------------------------------------


def pigeonhole(rng: np.random.Generator, figures: np.ndarray, num_resamples: int = 400) -> tuple[float, float]:
    """Owen's bootstrap: replicates and documents drawn anew, and the percentiles of the means. figures: (R, n)."""
    num_seeds, num_items = figures.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples)
    items = rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=num_resamples)
    means = np.einsum("br,rn,bn->b", seeds, figures, items) / num_seeds / num_items
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def print_seeds(num_trials: int) -> None:
    table("seeds", "what varies most", "before: bootstrap of both", "after: t tails")
    for num_seeds in (2, 3):
        for name, by_seed, by_document, by_both in (
            ("seeds", 1, 0.3, 0.3),
            ("documents", 0.3, 1, 0.3),
            ("all", 1, 1, 1),
        ):
            rng = np.random.default_rng(num_seeds)
            hits = np.zeros(2)
            for _ in range(num_trials):
                shape = num_seeds, 20
                figures = by_seed * rng.standard_normal((num_seeds, 1)) + np.sqrt(20) * (
                    by_document * rng.standard_normal((1, 20)) + by_both * rng.standard_normal(shape)
                )
                ones = np.ones(shape)
                low, high = pigeonhole(rng, figures)
                interval = crossed_ratio_difference(figures, ones, 0 * ones, ones).interval
                hits += low <= 0 <= high, interval is not None and 0 in interval
            row(num_seeds, name, *map(percent, hits / num_trials))


def main() -> None:
    num_trials = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_TRIALS
    print_false_verdicts(num_trials)
    print_few_clusters(num_trials)
    print_win_rates(num_trials)
    print_families(num_trials)
    print_false_equivalence(num_trials)
    print_power(num_trials)
    print_neighbours(num_trials)
    print_few_documents(num_trials)
    print_seeds(num_trials)


if __name__ == "__main__":
    main()
