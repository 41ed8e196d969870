"""A KV cache too small for all requests: some are thrown out of it and computed again."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.server.one_model.vllm.engines import TEXTS, TOLERANCE_NATS, engine, exported, run

pytestmark = pytest.mark.vllm

MIXTURES = {
    "geometric": {"members": {"llama": 1, "deep": 2}, "pool": "geometric"},
    "posterior with a share": {"members": {"llama": 1, "deep": 2}, "pool": "posterior", "share": 0.05},
}


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return MIXTURES[request.param]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preempted_requests_end_as_if_nothing_had_happened(
    enable_prefix_caching, mixture, members, judge, tmp_path, monkeypatch
):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    original = Scheduler._preempt_request

    def preempt(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    folder = exported(members, tmp_path / "out", **mixture)
    # Four requests of up to 4 blocks each, but only 8 blocks and the one that stays empty.
    settings = {"num_gpu_blocks_override": 9, "max_model_len": 128, "enable_prefix_caching": enable_prefix_caching}
    with engine(folder, **settings) as llm:
        outputs = run(llm, TEXTS, max_tokens=70, prompt_logprobs=None)
    assert preempted
    for output in outputs:
        assert judge(output, mixture["members"], mixture["pool"], mixture.get("share", 0.0)) < TOLERANCE_NATS
