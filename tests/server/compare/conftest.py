from __future__ import annotations

import pytest

from ensemble_server.server.compare.merges import merge_process, merging


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges: a new process imports for seconds; what it does is the same."""
    monkeypatch.setattr(merging, "_run_in_own_process", merge_process.run)
