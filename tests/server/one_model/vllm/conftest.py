"""Tests here run where vLLM is installed (`make vllm-env`), the pure ones everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.server.one_model.vllm.engines import Judge, make_members

# Before vLLM is imported. One process: an engine is up in seconds, and nothing is left behind when a test fails.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="session")
def judge(members: dict[str, Path]) -> Judge:
    return Judge(members)
