"""torch.compile: two members of one shape, each with its own code, and members on one base."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from torch._dynamo.utils import counters

from tests.server.one_model.vllm.engines import TOLERANCE_NATS, engine, exported, logprobs_of, run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_compiled_members_say_what_they_say_uncompiled(members, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    mixture = {"members": {"llama": 1, "twin": 2}, "pool": "posterior"}
    with engine(exported(members, tmp_path / "out", **mixture), enforce_eager=False) as llm:
        outputs = run(llm)
    for output in outputs:
        assert judge(output, mixture["members"], mixture["pool"]) < TOLERANCE_NATS


def test_a_compiled_shared_base_says_what_it_says_uncompiled(members, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    weights = {"llama": 1, "red": 2, "green": 1}
    folder = exported(members, tmp_path / "out", members=weights)
    requests = [None, {"ensemble_weights": [0, 1, 0]}, {"ensemble_pool": "geometric", "ensemble_weights": [1, 1, -0.5]}]
    said = {}
    for is_eager in (True, False):
        graphs = counters["stats"]["unique_graphs"]
        with engine(folder, enforce_eager=is_eager) as llm:
            said[is_eager] = [output for extra in requests for output in run(llm, extra_args=extra)]
            graphs = counters["stats"]["unique_graphs"] - graphs
    assert graphs == 1  # the whole backbone, base and changes
    for eager, compiled in zip(said[True], said[False], strict=True):
        assert compiled.outputs[0].token_ids == eager.outputs[0].token_ids
        assert abs(logprobs_of(compiled) - logprobs_of(eager)).max() < 1e-4
    assert max(judge(output, weights) for output in said[False][: len(said[False]) // len(requests)]) < TOLERANCE_NATS
