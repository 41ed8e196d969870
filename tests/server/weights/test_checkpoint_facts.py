"""Contexts and end-of-text ids as checkpoints write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ensemble_server.server.weights.checkpoint_facts import id_set, max_positions


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": None}, 4096),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
            },
            4096,
        ),
        ({}, None),
    ],
)
def test_the_context_is_the_one_before_an_extension(config: dict[str, Any], expected: int | None) -> None:
    assert max_positions(SimpleNamespace(**config)) == expected


@pytest.mark.parametrize(("value", "expected"), [(None, set()), (0, {0}), (2, {2}), ([2, 7], {2, 7}), ([], set())])
def test_ids_are_one_several_or_none(value: Any, expected: set[int]) -> None:
    assert id_set(value) == expected
