"""A plugin of pytest: vLLM's V2 model runner, that of GPUs, on a CPU; its Triton kernels run in Triton's interpreter.

    pip install triton
    python -m pytest -p tests.server.one_model.vllm.on_v2_runner -m vllm tests/server/one_model/vllm/test_mixtures.py

vLLM's CPU build asks for a Triton with a backend for CPUs. The interpreter needs none, so one is only named here.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
