"""Gates for tests: drawn at random, so that each of their numbers matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from ensemble_server.ensembles.base import GATE_CONTEXT, GATE_FEATURES, Gate, GateContext, GateMember, GateTerm


def a_gate(
    weights: Mapping[str, float],
    share: float | Literal["auto"] = 0.05,
    *,
    size: float = 0.5,
    identities: Mapping[str, str] | None = None,
) -> Gate:
    """For members of these weights. `size`: of what it has learnt; 0 is the posterior pool itself."""
    rng, total = np.random.default_rng(0), sum(weights.values())
    return Gate(
        share=share,
        features={name: GateTerm(scale=rng.uniform(0.5, 2), weight=rng.normal() * size) for name in GATE_FEATURES},
        context={name: GateContext(mean=rng.normal(), scale=rng.uniform(0.5, 2)) for name in GATE_CONTEXT},
        members={
            name: GateMember(
                identity=(identities or {}).get(name, ""),
                prior=weight / total,
                slopes={key: rng.normal() * size for key in GATE_CONTEXT},
            )
            for name, weight in weights.items()
        },
    )
