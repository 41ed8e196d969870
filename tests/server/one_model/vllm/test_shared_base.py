"""Members on one base in vLLM: each says what it says alone, for every pool, and the base is held once."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.conftest import make_adapter
from tests.server.one_model.vllm.engines import (
    TEXTS,
    TOLERANCE_NATS,
    Judge,
    engine,
    exported,
    logprobs_of,
    run,
)

pytestmark = pytest.mark.vllm

MIXTURES = {
    "arithmetic": {"members": {"llama": 1, "red": 2, "narrow": 1}},
    "geometric with a negative weight": {
        "members": {"red": 1.5, "deep": 0.5, "narrow": -0.5, "green": 0.5},
        "pool": "geometric",
    },
    "posterior with a share": {"members": {"narrow": 1, "llama": 2, "red": 1}, "pool": "posterior", "share": 0.05},
}


@pytest.fixture(scope="module")
def shared(members, tmp_path_factory):
    """Besides the members of all tests an adapter of another rank that leaves most layers alone."""
    folder = tmp_path_factory.mktemp("narrow") / "narrow"
    narrow = make_adapter(folder, members["llama"], seed=12, rank=2, target_modules=["v_proj", "down_proj"])
    return members | {"narrow": narrow}


@pytest.fixture(scope="module")
def judge(shared):
    return Judge(shared)


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request):
    return MIXTURES[request.param]


@pytest.fixture(scope="module")
def llm(mixture, shared, tmp_path_factory):
    with engine(exported(shared, tmp_path_factory.mktemp("ensemble") / "out", **mixture)) as llm:
        yield llm


def says(judge, output, mixture):
    return judge(output, mixture["members"], mixture.get("pool", "arithmetic"), mixture.get("share", 0.0))


def test_log_probabilities_are_the_references(llm, mixture, judge):
    assert max(says(judge, output, mixture) for output in run(llm)) < TOLERANCE_NATS


def test_one_by_one_the_answers_are_the_same(llm, mixture, judge):
    together = run(llm, prompt_logprobs=None)
    for text, expected in zip(TEXTS, together, strict=True):
        [alone] = run(llm, [text], prompt_logprobs=None)
        assert alone.outputs[0].token_ids == expected.outputs[0].token_ids
        assert abs(logprobs_of(alone) - logprobs_of(expected)).max() < 1e-4


def test_every_member_can_be_asked_alone(llm, mixture, judge):
    names = list(mixture["members"])
    one_hot = [[float(name == other) for other in names] for name in names]
    extra = [{"ensemble_weights": weights, "ensemble_pool": "arithmetic"} for weights in one_hot]
    for name, output in zip(names, run(llm, TEXTS[: len(names)], extra_args=extra), strict=True):
        assert judge(output, {name: 1.0}) < TOLERANCE_NATS


def test_the_base_is_held_once_and_every_member_has_its_own_cache(llm, mixture, shared):
    on_base = [name for name in mixture["members"] if name != "deep"]

    def look(model):
        [base] = [backbone for backbone in model.children() if hasattr(backbone, "base")]
        weights = {name: tuple(parameter.shape) for name, parameter in base.named_parameters() if "lm_head" not in name}
        return len(weights), [layer.attention.num_kv_heads for layer in base.modules() if hasattr(layer, "attention")]

    [(num_weights, kv_heads)] = llm.apply_model(look)
    assert num_weights == 2 * 6 + 2  # per block four linear layers (fused) and two norms; embedding and last norm
    assert kv_heads == [len(on_base)] * 2  # one head each in the base


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_bases_of_other_families_can_be_shared(family, members, tmp_path):
    """`llama` is what the base of all adapters is called in these tests."""
    family = {"llama": members[family]}
    for seed, name in enumerate(("red", "green")):
        family[name] = make_adapter(tmp_path / name, family["llama"], seed=seed, rank=2 + seed)
    judge = Judge(family)
    with engine(exported(family, tmp_path / "out", members=list(family))) as llm:
        assert max(judge(output, dict.fromkeys(family, 1.0)) for output in run(llm)) < TOLERANCE_NATS
