"""Tests here that are marked `vllm` run where vLLM is installed (`make test-vllm`), all others everywhere."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # some of vLLM's helpers are compiled at first use, for a minute
