"""What a start need not import is not imported, and is there for whoever wants it afterwards."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from ensemble_server.server.weights.lean_transformers import import_transformers
import_transformers()
from ensemble_server.server.engines.transformers_engine import engine, members
assert "torch" in sys.modules
print(*(name for name in ("sklearn", "scipy", "pandas") if name in sys.modules))
from transformers.utils import is_scipy_available
print(is_scipy_available())
"""


@pytest.mark.slow
def test_the_engine_is_imported_without_packages_that_it_does_not_use():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "True"]
