from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_look_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each run the harness asks pip, compilers and the processor what they are, which is more work than its task;
    we read none of it.
    """
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
