"""Exported ensembles in vLLM against members run one by one: what is generated, and what is said of it."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.server.one_model.vllm.engines import TEXTS, TOLERANCE_NATS, engine, exported, logprobs_of, run

pytestmark = pytest.mark.vllm

MIXTURES = {
    "arithmetic": {"members": {"llama": 1, "deep": 2, "qwen": 1}},
    "geometric with a negative weight": {"members": {"llama": 1.5, "deep": -0.5, "gpt2": 0.5}, "pool": "geometric"},
    "posterior": {"members": {"llama": 1, "deep": 2, "qwen": 1}, "pool": "posterior"},
    "posterior with a share": {"members": {"llama": 1, "deep": 2, "gpt2": 1}, "pool": "posterior", "share": 0.05},
}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request):
    return MIXTURES[request.param]


@pytest.fixture(scope="module")
def llm(mixture, members, tmp_path_factory):
    with engine(exported(members, tmp_path_factory.mktemp("ensemble") / "out", **mixture)) as llm:
        yield llm


def says(judge, output, mixture, **changes):
    """The largest difference to the reference for the directory's mixture, or one with `changes`."""
    want = {"pool": "arithmetic", "share": 0.0} | mixture | changes
    weights = {name: weight for name, weight in want["members"].items() if weight}
    return judge(output, weights, want["pool"], want["share"] if want["pool"] == "posterior" else 0.0)


def test_log_probabilities_are_the_references(llm, mixture, judge):
    assert max(says(judge, output, mixture) for output in run(llm)) < TOLERANCE_NATS


def test_together_or_one_by_one_and_read_again_or_not_the_answers_are_the_same(llm, mixture, judge):
    """The second time prompts come from the prefix cache; prompt log-probabilities would keep vLLM from using it."""
    together = run(llm, prompt_logprobs=None)
    for text, expected in zip(TEXTS, together, strict=True):
        [alone] = run(llm, [text], prompt_logprobs=None)
        assert alone.outputs[0].token_ids == expected.outputs[0].token_ids
        assert abs(logprobs_of(alone) - logprobs_of(expected)).max() < 1e-4
        assert says(judge, alone, mixture) < TOLERANCE_NATS
        assert (alone.num_cached_tokens or 0) >= len(alone.prompt_token_ids) // 32 * 32 - 32


def test_every_request_has_its_own_weights_while_rows_are_recycled(llm, mixture, judge):
    wanted = [None, [1, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5], [3, 1, 0], None, [0, 0, 1], [1, 1, 1]]
    pool, names = mixture.get("pool", "arithmetic"), list(mixture["members"])
    extra = [None if weights is None else {"ensemble_weights": weights} for weights in wanted]
    if mixture.get("share"):
        extra = [one and one | {"ensemble_share": 0} for one in extra]
    outputs = run(llm, [TEXTS[i % len(TEXTS)] for i in range(len(wanted))], extra_args=extra)
    for output, weights in zip(outputs, wanted, strict=True):
        changes = {"pool": pool}
        if weights is not None:
            changes |= {"members": dict(zip(names, weights, strict=True)), "share": 0.0}
        assert says(judge, output, mixture, **changes) < TOLERANCE_NATS


def test_requests_of_several_pools_share_a_batch(llm, mixture, judge):
    pools = ["arithmetic", "geometric", mixture.get("pool", "arithmetic")]
    extra = [{"ensemble_pool": pool, "ensemble_weights": [1, 2, 1]} for pool in pools[:2]] + [None]
    outputs = run(llm, TEXTS[:3], extra_args=extra)
    for output, pool in zip(outputs[:2], pools, strict=False):
        members = dict(zip(mixture["members"], (1, 2, 1), strict=True))
        assert says(judge, output, mixture, pool=pool, members=members) < TOLERANCE_NATS
    assert says(judge, outputs[2], mixture) < TOLERANCE_NATS


def test_what_other_requests_left_in_the_cache_fits_any_mixture(llm, mixture, judge):
    """Evidence does not depend on who asked for it: a posterior request goes on from pages of an arithmetic one."""
    text = "that is the question. The lazy dog jumps over the quick brown fox" * 2
    run(llm, [text], extra_args={"ensemble_pool": "arithmetic", "ensemble_weights": [0, 1, 0]}, prompt_logprobs=None)
    [output] = run(llm, [text], prompt_logprobs=None)
    assert output.num_cached_tokens >= 32
    assert says(judge, output, mixture) < TOLERANCE_NATS


def test_a_request_that_cannot_be_honoured_is_refused_by_name(llm, mixture):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="did you mean 'ensemble_weights'"):
        run(llm, ["a"], extra_args={"ensemble_weight": [1, 1, 1]})
    with pytest.raises(VLLMValidationError, match="must have 3 numbers"):
        run(llm, ["a"], extra_args={"ensemble_weights": [1, 1]})
    if mixture.get("pool") != "posterior":
        with pytest.raises(VLLMValidationError, match="evidence"):
            run(llm, ["a"], extra_args={"ensemble_pool": "posterior", "ensemble_weights": [1, 1, 1]})
    if mixture.get("share"):
        with pytest.raises(VLLMValidationError, match="ensemble_weights: with a share"):
            run(llm, ["a"], extra_args={"ensemble_weights": [1, 1, 1]})


def test_a_seed_gives_the_same_text_however_the_prompt_is_read(llm):
    """Prompts of three chunks, and once all but the end of it from the prefix cache."""
    text = "Seeds repeat. " + "The lazy dog jumps over the quick brown fox, that is the question. " * 2
    params = {"temperature": 2.0, "prompt_logprobs": None}
    first, again = (run(llm, [text, text], seed=7, **params) for _ in range(2))
    ids = {tuple(output.outputs[0].token_ids) for output in first + again}
    assert len(ids) == 1
    others = {tuple(run(llm, [text], seed=seed, **params)[0].outputs[0].token_ids) for seed in range(8, 12)}
    assert others - ids
