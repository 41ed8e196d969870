from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.deltas import (
    MixedLowRank,
    SignPlanes,
    Sparse,
    check_base,
    gaps_of,
    pack_codes,
    places_of,
    probe,
    unpack_codes,
)


def test_gaps_worked_out_by_hand() -> None:
    places = torch.tensor([0, 2, 600])
    assert gaps_of(places).tolist() == [0, 1, 255, 255, 87]
    assert places_of(gaps_of(places)).equal(places)


@pytest.mark.parametrize("density", [0.0005, 0.004, 0.5, 1.0])
def test_places_come_back_from_their_gaps(density: float) -> None:
    places = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(20_000) < density))
    assert places_of(gaps_of(places)).equal(places)


def test_codes_worked_out_by_hand() -> None:
    codes = torch.tensor([[-2, 1, 0, -1], [3, -4, 0, 0]], dtype=torch.int8)
    packed = pack_codes(codes, torch.tensor([2, 3], dtype=torch.uint8))
    assert [f"{byte:08b}" for byte in packed.tolist()] == ["00111001", "11100010", "01000000"]


def test_codes_come_back_from_their_bits() -> None:
    bits = torch.tensor([8, 8, 3, 2, 2], dtype=torch.uint8)
    random = np.random.default_rng(1)
    rows = [random.integers(-(1 << (b - 1)), 1 << (b - 1), size=77) for b in bits.tolist()]
    codes = torch.from_numpy(np.stack(rows).astype(np.int8))
    assert unpack_codes(pack_codes(codes, bits), bits, 77).equal(codes)


def test_every_form_comes_back_from_its_tensors_and_knows_their_size() -> None:
    torch.manual_seed(0)
    shape = (20, 150)
    bits = torch.tensor([8, 3, 2], dtype=torch.uint8)
    forms = [
        MixedLowRank(
            bits,
            torch.randint(-2, 2, (3, 150), dtype=torch.int8),
            torch.rand(3, 2).half(),
            torch.randint(-2, 2, (3, 20), dtype=torch.int8),
            torch.rand(3).half(),
        ),
        SignPlanes(torch.rand(2, *shape) < 0.5, torch.rand(2)),
        Sparse(shape, torch.arange(7, 3000, 300), torch.randn(10).half()),
    ]
    for form in forms:
        tensors = form.tensors()
        back = type(form).from_tensors(tensors, shape)
        assert back.dense().equal(form.dense())
        assert back.dense().shape == shape
        assert form.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_another_base_is_told_by_its_weights_and_a_rounded_one_is_not() -> None:
    weights = {"q": torch.randn(30, 40), "k": torch.randn(10, 40)}
    probes = {path: probe(weight) for path, weight in weights.items()}
    check_base(probes, {path: weight.bfloat16() for path, weight in weights.items()})
    with pytest.raises(ModelLoadError, match="made for other weights"):
        check_base(probes, weights | {"k": torch.randn(10, 40)})
    with pytest.raises(ModelLoadError, match="a layer k, which this one lacks"):
        check_base(probes, {"q": weights["q"]})
