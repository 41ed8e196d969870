"""Every layer of every member over two processes: the same mixture, from halves of heads, widths and vocabularies."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.server.one_model.vllm.engines import TEXTS, TOLERANCE_NATS, engine, exported, run

pytestmark = pytest.mark.vllm

# `llama` and its adapter share a base whose one head for keys and values both ranks hold; `deep` has two such heads.
WEIGHTS = {"deep": 1, "llama": 2, "red": 1, "qwen": 1}
POSTERIOR = {"pool": "posterior", "share": 0.02}


@pytest.fixture(scope="module")
def llm(members, tmp_path_factory):
    folder = exported(members, tmp_path_factory.mktemp("ensemble") / "out", members=WEIGHTS, **POSTERIOR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else vLLM wants a NUMA node for each process
        with engine(folder, tensor_parallel_size=2) as llm:
            yield llm


def test_the_posterior_pool_follows_its_evidence_on_every_rank(llm, judge):
    assert llm.llm_engine.vllm_config.parallel_config.world_size == 2
    outputs = run(llm)
    assert max(judge(output, WEIGHTS, POSTERIOR["pool"], POSTERIOR["share"]) for output in outputs) < TOLERANCE_NATS


def test_evidence_in_the_prefix_cache_is_whole(llm, judge):
    text = "that is the question. The lazy dog jumps over the quick brown fox" * 2
    for expected in (0, 32):
        [output] = run(llm, [text], prompt_logprobs=None)
        assert (output.num_cached_tokens or 0) >= expected
        assert judge(output, WEIGHTS, POSTERIOR["pool"], POSTERIOR["share"]) < TOLERANCE_NATS


def test_requests_with_mixtures_of_their_own_share_a_batch(llm, judge):
    geometric = {"deep": 1.5, "llama": -0.5, "red": 0.5, "qwen": 0.5}
    asked = [({name: 1.0}, "arithmetic") for name in WEIGHTS] + [(geometric, "geometric")]
    extra = [
        {"ensemble_weights": [weights.get(name, 0.0) for name in WEIGHTS], "ensemble_pool": pool}
        for weights, pool in asked
    ]
    for output, (weights, pool) in zip(run(llm, TEXTS[: len(asked)], extra_args=extra), asked, strict=True):
        assert judge(output, weights, pool) < TOLERANCE_NATS
