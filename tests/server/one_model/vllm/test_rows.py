"""A row's mixture on its way through hidden states. Needs torch, no vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemble_server.server.one_model.vllm.request_mixture import RequestMixture
from ensemble_server.server.one_model.vllm.rows import ARITHMETIC, GEOMETRIC, columns_of, kind_of, mix, packed, unpacked
from tests.reference import pooled

MIXTURES = [
    RequestMixture((0.2, 0.8, 0.0), "arithmetic", 0.0),
    RequestMixture((1.5, -0.5, 0.25), "geometric", 0.0),
    RequestMixture((0.0, 0.0, 1.0), "arithmetic", 0.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_survive_bit_by_bit(dtype):
    hidden = [torch.randn(3, width).to(dtype) for width in (6, 4, 5)]
    columns = torch.tensor([columns_of(mixture) for mixture in MIXTURES])
    columns[:, -1] = torch.tensor([-1, 0, 2**31 - 1], dtype=torch.int32).view(torch.float32)
    rows = packed(hidden, columns)[[2, 0, 1]]
    parts, found = unpacked(rows, [6, 4, 5])
    assert all(torch.equal(part, old[[2, 0, 1]]) for part, old in zip(parts, hidden, strict=True))
    assert torch.equal(found.view(torch.int32), columns[[2, 0, 1]].view(torch.int32))


@pytest.mark.parametrize("which", [[0, 2], [1], [0, 1, 2]])
def test_every_row_is_pooled_as_it_says(which):
    torch.manual_seed(0)
    mixtures = [MIXTURES[index] for index in which]
    logprobs = [torch.log_softmax(3 * torch.randn(len(which), 11), -1) for _ in range(3)]
    columns = torch.tensor([columns_of(mixture) for mixture in mixtures])
    found = mix(logprobs, columns, {kind_of(mixture) for mixture in mixtures})
    for row, mixture in enumerate(mixtures):
        members = np.stack([one[row].double().numpy() for one in logprobs])[:, None]
        expected, _ = pooled(mixture.pool, members, mixture.weights, [0])
        np.testing.assert_allclose(found[row], expected[0], atol=1e-5)


def test_kinds_tell_the_pools_apart():
    assert [kind_of(mixture) for mixture in MIXTURES] == [ARITHMETIC, GEOMETRIC, ARITHMETIC]
