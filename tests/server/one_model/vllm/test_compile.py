"""torch.compile: two members of one shape, each with its own code."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.server.one_model.vllm.engines import TOLERANCE_NATS, engine, exported, run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_compiled_members_say_what_they_say_uncompiled(members, judge, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    mixture = {"members": {"llama": 1, "twin": 2}, "pool": "posterior"}
    with engine(exported(members, tmp_path / "out", **mixture), enforce_eager=False) as llm:
        outputs = run(llm)
    for output in outputs:
        assert judge(output, mixture["members"], mixture["pool"]) < TOLERANCE_NATS
