"""A model against a baseline on the same items, all that a report says of it: estimate, test, effect size, counts.

Three kinds of figures are told apart: right or wrong (0/1), real scores (ROUGE, chrF, the mean of several samples), and
costs per length (nats per document of so many bytes: bits per byte).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.bootstrap import NUM_RESAMPLES
from ensemble_server.ensembles.comparison.effect_size import cohens_d_z, cohens_h, discordant_odds
from ensemble_server.ensembles.comparison.intervals import Estimate
from ensemble_server.ensembles.comparison.power import minimal_detectable_effect
from ensemble_server.ensembles.comparison.significance import McNemar, mcnemar, sign_flip


@dataclass(frozen=True)
class Comparison:
    """Model less baseline. `effect_size` is Cohen's h for right and wrong, d_z for real figures (see `effect_size`).

    `minimal_detectable_effect`: at 80% power, None with fewer than two items. `wins`, `losses`, `ties`: items on which
    the model is better, worse or equal. `mcnemar`, `odds`: for right and wrong only.
    """

    difference: Estimate
    test: Literal["mcnemar", "sign_flip"]
    p_value: float
    effect_size: float
    effect_size_name: Literal["cohens_h", "cohens_d_z"]
    minimal_detectable_effect: float | None
    wins: int
    losses: int
    ties: int
    mcnemar: McNemar | None = None
    odds: float | None = None


def compare_right_wrong(
    model: np.ndarray,
    baseline: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Comparison:
    """Both (num_items,) of 0 and 1; failed and missing items count as 0. The difference is one of shares.

    The test is McNemar's; with `clusters`, whose items are not independent, the sign-flip test on clusters.
    """
    model, baseline = _aligned(model, baseline)
    assert np.isin([model, baseline], (0.0, 1.0)).all(), "right or wrong: every figure must be 0 or 1"
    difference = bootstrap.mean(
        model - baseline, clusters=clusters, seed=seed, num_resamples=num_resamples, level=level
    )
    counts = mcnemar(model == 1, baseline == 1)
    differences = model - baseline
    is_clustered = clusters is not None  # McNemar's items are independent; items of one cluster are not
    return Comparison(
        difference,
        "sign_flip" if is_clustered else "mcnemar",
        sign_flip(_per_cluster(differences, clusters), seed=seed) if is_clustered else counts.p_value,
        cohens_h(float(model.mean()), float(baseline.mean())),
        "cohens_h",
        _detectable(difference, level),
        counts.only_model,
        counts.only_baseline,
        len(model) - counts.only_model - counts.only_baseline,
        counts,
        discordant_odds(counts.only_model, counts.only_baseline),
    )


def compare_scores(
    model: np.ndarray,
    baseline: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Comparison:
    """Both (num_items,) or (num_items, num_samples), higher is better; samples are averaged within their item."""
    model, baseline = _aligned(bootstrap.within_item(model), bootstrap.within_item(baseline))
    differences = model - baseline
    difference = bootstrap.mean(differences, clusters=clusters, seed=seed, num_resamples=num_resamples, level=level)
    return Comparison(
        difference,
        "sign_flip",
        sign_flip(_per_cluster(differences, clusters), seed=seed),
        cohens_d_z(differences),
        "cohens_d_z",
        _detectable(difference, level),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
        int((differences == 0).sum()),
    )


def compare_bits_per_byte(
    nats: np.ndarray,
    num_bytes: np.ndarray,
    baseline_nats: np.ndarray,
    baseline_num_bytes: np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> Comparison:
    """All (num_documents,), lower is better: wins are documents with fewer bits per byte.

    Ratio of sums, so that long documents count for more. The test flips the signs of the documents' differences in
    bits, each scaled to the bytes that both models were scored on (which differ a little between tokenizers).
    """
    nats, baseline_nats = _aligned(nats, baseline_nats)
    num_bytes, baseline_num_bytes = _aligned(num_bytes, baseline_num_bytes)
    bits, baseline_bits = nats / math.log(2), baseline_nats / math.log(2)
    difference = bootstrap.ratio_difference(
        bits,
        num_bytes,
        baseline_bits,
        baseline_num_bytes,
        clusters=clusters,
        seed=seed,
        num_resamples=num_resamples,
        level=level,
    )
    scored = (num_bytes > 0) & (baseline_num_bytes > 0)  # a document of one token has nothing to predict
    per_document = (bits[scored] / num_bytes[scored]) - (baseline_bits[scored] / baseline_num_bytes[scored])
    # Linearised, so that they add up to the difference of the two ratios.
    shares = bits / num_bytes.sum() - baseline_bits / baseline_num_bytes.sum()
    return Comparison(
        difference,
        "sign_flip",
        sign_flip(_per_cluster(shares, clusters), seed=seed),
        cohens_d_z(per_document),
        "cohens_d_z",
        _detectable(difference, level),
        int((per_document < 0).sum()),
        int((per_document > 0).sum()),
        len(bits) - int((per_document != 0).sum()),
    )


def _aligned(model: np.ndarray, baseline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model, baseline = np.asarray(model, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if model.shape != baseline.shape:
        raise ValueError(f"paired figures must be of the same items; there are {model.shape} and {baseline.shape}")
    return model, baseline


def _per_cluster(differences: np.ndarray, clusters: Sequence[object] | None) -> np.ndarray:
    return bootstrap.by_cluster(differences[:, None], clusters)[:, 0]


def _detectable(difference: Estimate, level: float) -> float | None:
    error = difference.standard_error
    return None if error is None else minimal_detectable_effect(error, level=level)
