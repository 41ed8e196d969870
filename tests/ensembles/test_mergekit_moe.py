from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from ensemble_server.ensembles.mergekit_moe import MoeConfig, routes

# In the form of mergekit's own documentation, with every key that it knows.
FILE = """
base_model: org/base-7b
gate_mode: hidden
dtype: bfloat16
architecture: qwen
experts_per_token: 1
experts:
  - source_model: org/coder-7b
    positive_prompts: ["def f(x):", "Fix this bug"]
    negative_prompts: ["Dear diary"]
    noise_scale: 0.1
  - source_model: org/poet-7b
    positive_prompts: ["Shall I compare thee"]
shared_experts:
  - source_model: org/base-7b
    positive_prompts: ["anything"]
    residual_scale: 0.1
"""


def test_experts_become_routes_and_merge_only_keys_are_read_over() -> None:
    moe = MoeConfig.model_validate(yaml.safe_load(FILE))
    assert moe.experts_per_token == 1
    assert routes(moe, {"org/coder-7b": "code", "org/base-7b": "base"}) == {
        "code": {"positive_prompts": ("def f(x):", "Fix this bug"), "negative_prompts": ("Dear diary",)},
        "org/poet-7b": {"positive_prompts": ("Shall I compare thee",)},
        "base": {"always": True, "residual_scale": 0.1},
    }


def test_two_experts_of_one_name_are_refused() -> None:
    moe = MoeConfig.model_validate(yaml.safe_load(FILE))
    with pytest.raises(ValueError, match="'org/poet-7b' as a second expert 'x'"):
        routes(moe, {"org/coder-7b": "x", "org/poet-7b": "x"})


def test_a_gate_without_prompts_is_refused() -> None:
    with pytest.raises(ValidationError, match="gate_mode"):
        MoeConfig.model_validate({"experts": [{"source_model": "a"}], "gate_mode": "random"})
