"""Mixtures that vLLM cannot run are refused before it is asked."""

from __future__ import annotations

import pytest

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.vllm_engine.one_prompt import check_one_model
from tests.gates import a_gate


def test_a_gate_is_refused_by_name():
    weights = {"base": 1.0, "code": 1.0}
    with pytest.raises(ModelLoadError, match="gate: vLLM keeps the members' distributions in its own process"):
        check_one_model(Mixture(weights, "posterior", 0.05, gate=a_gate(weights)), [])
