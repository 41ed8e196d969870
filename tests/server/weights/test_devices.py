from __future__ import annotations

import pytest
import torch

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.devices import resolve_device, rooms, spread


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device("auto") == ("cpu" if accelerator is None else str(accelerator))
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["cuda:77", "xpu:77", "mps:7"])
def test_a_device_that_is_not_there_is_refused_with_what_is(device: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"device '{device}' is not there: this machine has .*or take auto"):
        resolve_device(device)


def test_weights_are_spread_by_room_the_largest_first() -> None:
    assert spread({"small": 2, "large": 8, "middle": 5}, [10, 9]) == {"large": 0, "middle": 1, "small": 1}


def test_equal_weights_take_equal_devices_in_turn() -> None:
    assert spread({"a": 1, "b": 1, "c": 1, "d": 1}, [10, 10]) == {"a": 0, "b": 1, "c": 0, "d": 1}


def test_there_is_no_choice_without_several_accelerators() -> None:
    if torch.accelerator.device_count() < 2:
        assert rooms() == []
