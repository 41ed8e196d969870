from __future__ import annotations

import pytest
import torch

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.devices import resolve_device


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device("auto") == ("cpu" if accelerator is None else str(accelerator))
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["cuda:77", "xpu:77", "mps:7"])
def test_a_device_that_is_not_there_is_refused_with_what_is(device: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"device '{device}' is not there: this machine has .*or take auto"):
        resolve_device(device)
