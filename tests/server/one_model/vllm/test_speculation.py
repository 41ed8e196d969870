"""Speculative decoding, drafted by n-grams and by a member: answers, and what is said of them, stay the mixture's."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.server.one_model.vllm.engines import TEXTS, TOLERANCE_NATS, engine, exported, run

pytestmark = pytest.mark.vllm

NAMES = ("tight", "deep", "qwen")
MIXTURES = {
    "arithmetic": {"members": {"tight": 5, "deep": 1, "qwen": 1}},
    "posterior": {"members": {"tight": 5, "deep": 1, "qwen": 1}, "pool": "posterior", "share": 0.02},
}


DRAFTED = [("arithmetic", "draft_model"), ("posterior", "draft_model"), ("posterior", "ngram")]


@pytest.fixture(scope="module", params=DRAFTED, ids="-".join)
def drafted(request):
    mixture, method = request.param
    return MIXTURES[mixture], method


@pytest.fixture(scope="module")
def mixture(drafted):
    return drafted[0]


@pytest.fixture(scope="module")
def llm(drafted, members, tmp_path_factory):
    mixture, method = drafted
    speculation = {
        "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1},
        "draft_model": {"method": "draft_model", "model": str(members["tight"]), "num_speculative_tokens": 3},
    }[method]
    folder = exported(members, tmp_path_factory.mktemp("ensemble") / "out", **mixture)
    with pytest.MonkeyPatch.context() as patch:
        if method == "ngram":  # its compiled code stops vLLM from starting a second engine in the same process
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with engine(folder, speculative_config=speculation, disable_log_stats=False, max_num_batched_tokens=64) as llm:
            yield llm


def drafts_accepted(llm) -> float:
    counters = {metric.name: metric for metric in llm.get_metrics()}
    return counters["vllm:spec_decode_num_accepted_tokens"].value


def test_speculation_changes_nothing(llm, mixture, judge):
    accepted = drafts_accepted(llm)
    outputs = run(llm, TEXTS, max_tokens=24)
    assert drafts_accepted(llm) > accepted
    for output in outputs:
        found = judge(output, mixture["members"], mixture.get("pool", "arithmetic"), mixture.get("share", 0.0))
        assert found < TOLERANCE_NATS


def test_requests_keep_their_own_weights(llm, mixture, judge):
    wanted = [[1, 0, 0], [0, 1, 0], [1, 2, 3], [0, 0, 1], [3, 1, 0]]
    extra = [{"ensemble_weights": weights, "ensemble_pool": "geometric"} for weights in wanted]
    outputs = run(llm, TEXTS[:5], extra_args=extra, max_tokens=24)
    for output, weights in zip(outputs, wanted, strict=True):
        present = {name: weight for name, weight in zip(NAMES, weights, strict=True) if weight}
        assert judge(output, present, "geometric") < TOLERANCE_NATS
