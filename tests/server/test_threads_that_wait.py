"""How OpenMP's threads wait is settled before torch is imported, in every process that imports the server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("settings", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["by default", "as the user says", "by the user's policy"],
)
def test_threads_spin_for_a_bounded_time_unless_the_user_has_settled_it(
    settings: dict[str, str], spins: str | None
) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = (
        "import os, sys, ensemble_server.server.cli.app; "
        "assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], env=own | settings, capture_output=True, text=True, check=True
    ).stdout
    assert told.strip() == str(spins)
