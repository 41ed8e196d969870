"""The check that travels as a name in vLLM's config."""

from __future__ import annotations

import re

import pytest

from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.one_model.vllm.admission import admission_name, without_admission
from ensemble_server.server.one_model.vllm.request_mixture import Directory

DIRECTORY = Directory(("base", 'a "odd" name'), Mixture({"base": 1.0, 'a "odd" name': 2.0}, "geometric"))


@pytest.mark.vllm
@pytest.mark.parametrize("is_v2_runner", [False, True])
def test_vllm_finds_a_class_behind_the_name_that_checks_requests(is_v2_runner):
    pytest.importorskip("vllm")
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    names = [admission_name(DIRECTORY, is_v2_runner=is_v2_runner)]
    if is_v2_runner:
        check = build_custom_logits_processors_params_validator(names)
    else:

        def check(params):
            validate_logits_processors_parameters(names, params)

    check(SamplingParams(extra_args={"ensemble_weights": [1, -0.5]}))
    check(SamplingParams())
    with pytest.raises(
        VLLMValidationError, match=re.escape('must have 2 numbers, one per member (base, a "odd" name)')
    ):
        check(SamplingParams(extra_args={"ensemble_weights": [1]}))


def test_the_workers_list_holds_only_processors_that_have_work():
    name = admission_name(DIRECTORY, is_v2_runner=False)
    assert without_admission([name, "mine:Processor"]) == ["mine:Processor"]
    assert without_admission([name]) is None
    assert without_admission(None) is None
