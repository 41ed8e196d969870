"""Each method against the same in NumPy, written for reading."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from ensemble_server.server.deltas.dropping import density_for, drop_and_rescale
from ensemble_server.server.deltas.low_rank import decompose, low_rank
from ensemble_server.server.deltas.mixed_precision import DISTORTION, allot, mixed_precision, quantise
from ensemble_server.server.deltas.signs import sign_planes

SHAPES = {"wide": (24, 200), "tall": (160, 40), "square": (64, 64)}


@pytest.fixture(scope="module")
def deltas() -> dict[str, torch.Tensor]:
    """Falling singular values, of different sizes in different matrices."""
    made = {}
    torch.manual_seed(0)
    for number, (path, shape) in enumerate(SHAPES.items(), start=1):
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        made[path] = (u * (0.01 * number * 0.9 ** torch.arange(min(shape)))) @ v
    return made


@pytest.fixture(scope="module")
def moments() -> dict[str, torch.Tensor]:
    """Inputs of which some are much larger than others."""
    torch.manual_seed(1)
    made = {}
    for path, (_, num_in) in SHAPES.items():
        x = torch.randn(400, num_in) * torch.logspace(-1.5, 0.5, num_in)
        made[path] = x.T @ x / len(x)
    return made


def num_weights(deltas: dict[str, torch.Tensor]) -> int:
    return sum(delta.numel() for delta in deltas.values())


# --- low rank ---


def test_low_rank_is_numpys_best_of_the_ranks_that_water_filling_gives(deltas: dict[str, torch.Tensor]) -> None:
    budget = num_weights(deltas) / 4
    found = dict(low_rank({path: decompose(delta) for path, delta in deltas.items()}, budget))
    worth = []  # squared singular value per byte, by hand
    for path, delta in deltas.items():
        cost = 2 * sum(delta.shape)
        worth += [(value**2 / cost, cost, path) for value in np.linalg.svd(delta.numpy(), compute_uv=False)]
    ranks, spent = dict.fromkeys(deltas, 0), 0
    for _, cost, path in sorted(worth, reverse=True):
        if spent + cost > budget:
            break
        ranks[path], spent = ranks[path] + 1, spent + cost
    assert {path: len(one.a) for path, one in found.items()} == {path: rank for path, rank in ranks.items() if rank}
    assert len(set(ranks.values())) == 3  # or one rank for all would do
    assert sum(one.num_bytes for one in found.values()) == spent
    for path, one in found.items():
        u, s, v = np.linalg.svd(deltas[path].numpy(), full_matrices=False)
        rank = ranks[path]
        np.testing.assert_allclose(one.dense().numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=2e-5)


def test_weighed_by_its_inputs_the_output_is_nearer_and_the_matrix_is_not(
    deltas: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]
) -> None:
    delta, moment = deltas["square"], moments["square"]
    plain, weighed = (decompose(delta, of) for of in (None, moment))
    errors = {}
    for name, one in (("plain", plain), ("weighed", weighed)):
        left = (delta - one.b[:, :8] @ one.a[:8]).double()
        errors[name] = float((left @ moment.double() * left).sum()), float(left.square().sum())
    assert errors["weighed"][0] < 0.7 * errors["plain"][0]
    assert errors["weighed"][1] > errors["plain"][1]
    torch.testing.assert_close(weighed.b @ weighed.a, delta, atol=1e-5, rtol=0)  # all of them are the matrix


# --- mixed precision ---


def test_bits_fall_with_the_singular_values_and_fill_the_budget(deltas: dict[str, torch.Tensor]) -> None:
    budget = num_weights(deltas) / 8
    found = dict(mixed_precision(deltas, {path: decompose(delta) for path, delta in deltas.items()}, {}, budget))
    assert 0.9 * budget < sum(one.num_bytes for one in found.values()) <= budget
    for one in found.values():
        assert sorted(one.bits.tolist(), reverse=True) == one.bits.tolist()
    assert {count for one in found.values() for count in one.bits.tolist()} == {2, 3, 8}


def test_handed_out_bits_leave_least_error_per_byte(deltas: dict[str, torch.Tensor]) -> None:
    """No component would gain more by another number of bits, at the price of a byte that the budget implies."""
    decompositions = {path: decompose(delta) for path, delta in deltas.items()}
    allotted = allot(decompositions, num_weights(deltas) / 8)
    left = {bits: 1 - (1 - distortion) ** 2 for bits, distortion in DISTORTION.items()}
    cheapest, dearest = np.inf, 0.0  # of what was taken, of what was not
    for path, one in decompositions.items():
        bits = np.zeros(len(one.values), dtype=int)
        bits[: len(allotted[path])] = allotted[path]
        num_out, num_in = one.shape
        size = {b: b and 3 + 2 * -(-num_in // 128) + -(-num_in * b // 8) + -(-num_out * b // 8) for b in left}
        for value, b in zip(one.values.double().tolist(), bits.tolist(), strict=True):
            steps = sorted(left)
            place = steps.index(b)
            worth = [value**2 * (left[low] - left[high]) / (size[high] - size[low]) for low, high in pairwise(steps)]
            cheapest = min([cheapest, *worth[:place]])
            dearest = max([dearest, *worth[place:]])
    assert cheapest >= dearest


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_matrix_at_so_many_bits_has_about_the_error_that_was_reckoned_with(bits: int) -> None:
    torch.manual_seed(2)
    delta = torch.randn(256, 4) @ torch.randn(4, 384)
    found = quantise(delta, decompose(delta).a[:4], np.full(4, bits, dtype=np.uint8), None)
    error = float((found.dense() - delta).square().sum() / delta.square().sum())
    assert error < 1.3 * (1 - (1 - DISTORTION[bits]) ** 2)


def test_rounding_that_is_made_up_for_beats_rounding_to_the_nearest(
    deltas: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]
) -> None:
    delta, moment = deltas["wide"], moments["wide"].double()
    bits = np.full(12, 3, dtype=np.uint8)

    def error(of: torch.Tensor | None) -> float:
        left = (quantise(delta, decompose(delta, of).a[:12], bits, of).dense() - delta).double()
        return float((left @ moment * left).sum())

    assert error(moments["wide"]) < 0.8 * error(None)


# --- signs ---


def test_one_plane_is_numpys_signs_times_the_mean_magnitude(deltas: dict[str, torch.Tensor]) -> None:
    found = dict(sign_planes(deltas, {}, {}, num_weights(deltas) / 8 + 4 * len(deltas)))
    delta = deltas["square"].numpy()
    residual = delta.copy()
    for _ in range(len(found["square"].scales)):
        residual -= np.where(residual >= 0, 1, -1) * np.abs(residual).mean()
    np.testing.assert_allclose(found["square"].dense().numpy(), delta - residual, atol=1e-6)


def test_planes_go_where_the_error_is(deltas: dict[str, torch.Tensor]) -> None:
    planes = {path: len(one.scales) for path, one in sign_planes(deltas, {}, {}, num_weights(deltas) / 8 + 12)}
    assert planes["square"] > planes.get("wide", 0)  # its numbers are larger
    assert sum(planes[path] * deltas[path].numel() for path in planes) <= num_weights(deltas)


def test_with_inputs_the_scale_is_that_of_least_squares(
    deltas: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]
) -> None:
    delta, moment = deltas["tall"], moments["tall"]
    [(_, found)] = sign_planes({"tall": delta}, {"tall": moment}, {}, delta.numel() / 8 + 4)
    ridge = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    signs = np.where(delta.numpy() >= 0, 1, -1)

    def error(scale: float) -> float:
        left = delta.numpy() - scale * signs
        return float((left @ ridge.numpy() * left).sum())

    scale = float(found.scales[0])
    assert error(scale) < min(error(scale * 1.01), error(scale * 0.99))


# --- drop and rescale ---


def test_what_is_left_is_the_delta_over_the_density(deltas: dict[str, torch.Tensor]) -> None:
    found = dict(drop_and_rescale(deltas, num_weights(deltas) / 8, seed=3))
    for path, one in found.items():
        dense, delta = one.dense().numpy(), deltas[path].numpy()
        density = (dense != 0).mean()
        expected = np.where(dense != 0, delta / density, 0)
        np.testing.assert_allclose(dense, expected, rtol=1e-3, atol=1e-6)  # float16
    again = dict(drop_and_rescale(deltas, num_weights(deltas) / 8, seed=3))
    assert all(torch.equal(one.places, again[path].places) for path, one in found.items())
    other = dict(drop_and_rescale(deltas, num_weights(deltas) / 8, seed=4))
    assert not torch.equal(other["square"].places, found["square"].places)


@pytest.mark.parametrize("bits_per_weight", [0.1, 1.0, 4.0, 12.0])
def test_a_density_fills_its_budget(bits_per_weight: float) -> None:
    delta = {"one": torch.randn(300, 400)}
    [(_, found)] = drop_and_rescale(delta, bits_per_weight * 120_000 / 8, seed=0)
    assert 0.97 < 8 * found.num_bytes / 120_000 / bits_per_weight <= 1


def test_a_budget_for_all_drops_nothing() -> None:
    assert density_for(24) == 1.0
