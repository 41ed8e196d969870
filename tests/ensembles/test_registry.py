from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.method import Method, MethodConfig
from ensemble_server.ensembles.registry import METHODS, method_class


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_a_method_with_its_own_config_and_reference(name: str) -> None:
    cls = method_class(name)
    assert issubclass(cls, Method)
    assert issubclass(cls.Config, MethodConfig) and cls.Config is not MethodConfig
    assert re.match(r"https://", cls.reference)


@pytest.mark.parametrize("name", METHODS)
def test_every_config_explains_its_keys_and_knows_no_others(name: str) -> None:
    config = method_class(name).Config
    assert all(field.description for field in config.model_fields.values())
    with pytest.raises(ValueError, match="no_such_key"):
        config.model_validate({"method": name, "members": ["a", "b"], "no_such_key": 1})


def test_an_unknown_method_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'probability_averag'; did you mean 'probability_average'\?"):
        method_class("probability_averag")
    with pytest.raises(ConfigError) as caught:
        method_class("zzz")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in METHODS)


def test_the_menu_and_its_configs_load_without_torch() -> None:
    """So that a config can be checked, and --help printed, at once."""
    code = (
        "import sys; from ensemble_server.ensembles.registry import *; "
        "[method_class(name) for name in METHODS]; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()
