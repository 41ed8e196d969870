"""What a request may change of an ensemble, through its `"ensemble"` object: the checks that all methods share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from ensemble_server.ensembles.errors import RequestError


def check_overrides(overrides: Mapping[str, Any], allowed: Collection[str], members: Collection[str]) -> None:
    """Raise `RequestError` naming the field: each key must be `allowed`, `weights` a map from members to numbers."""
    check_keys(overrides, allowed, "ensemble")
    weights = overrides.get("weights", {})
    if not isinstance(weights, Mapping):
        raise RequestError("ensemble.weights must map member names to numbers", param="ensemble.weights")
    if strangers := set(weights) - set(members):
        raise RequestError(
            f"ensemble.weights names {min(strangers)!r}, which is no member (members: {', '.join(members)})",
            param="ensemble.weights",
        )
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            field = f"ensemble.weights.{name}"
            raise RequestError(f"{field} must be a number, got {weight!r}", param=field)


def check_keys(given: Mapping[str, Any], allowed: Collection[str], at: str) -> None:
    """Raise `RequestError` for a key of `given`, which stands at the path `at` of a request, that is not `allowed`."""
    for key in given:
        if key not in allowed:
            near = get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(allowed)
            raise RequestError(f"unknown key '{at}.{key}'{hint} (known: {known})", param=f"{at}.{key}")
