from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ensemble_server.server.engines.transformers_engine import packed_linear
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.packed_linear import PackedLinear, pack_linears, padded


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(packed_linear, "SMALLEST", 0)


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 65, 100])
@pytest.mark.parametrize("layer", [nn.Linear(32, 48), nn.Linear(48, 7, bias=False), Conv1D(48, 32)], ids=str)
def test_a_packed_layer_computes_what_the_layer_does(layer: nn.Module, rows: int) -> None:
    model = nn.Sequential(layer)
    x = torch.randn(1, rows, 48 if isinstance(layer, nn.Linear) and layer.in_features == 48 else 32)
    expected = model(x)
    assert pack_linears(model) == 1
    assert isinstance(model[0], PackedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected.detach(), atol=1e-5, rtol=1e-5)


def test_many_numbers_of_rows_are_computed_as_few() -> None:
    """Each is compiled, and kept, on its own."""
    sizes = [padded(rows) for rows in range(1, 2049)]
    assert sizes[:64] == list(range(1, 65))
    assert all(rows <= size <= rows * 1.125 for rows, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 64 + 5 * 8


def test_a_strided_input_is_read_rightly() -> None:
    layer, x = nn.Linear(32, 8), torch.randn(1, 32, 5).transpose(1, 2)
    expected = layer(x).detach()
    torch.testing.assert_close(PackedLinear(layer.weight, layer.bias)(x), expected, atol=1e-5, rtol=1e-5)


def test_only_plain_float32_linear_layers_are_packed() -> None:
    class OwnLinear(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(8, 8), nn.Embedding(8, 8), OwnLinear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8)
    )
    assert pack_linears(model) == 1
    assert [type(layer) for layer in model] == [PackedLinear, nn.Embedding, OwnLinear, nn.Linear, nn.LayerNorm]


def test_an_embedding_keeps_the_weights_it_shares_with_a_packed_head() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    model.head.weight = model.embed.weight
    before = model.embed.weight.clone()
    assert pack_linears(model) == 1
    assert torch.equal(model.embed.weight, before)
    torch.testing.assert_close(model.head(model.embed(torch.tensor([3]))), before[[3]] @ before.T)


def test_small_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "SMALLEST", 64)
    model = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 8), nn.Linear(8, 8))
    assert pack_linears(model) == 1
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, PackedLinear]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_a_model_of_packed_layers_gives_the_distributions_of_one_of_plain_ones(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def logprobs(*, is_packed: bool) -> torch.Tensor:
        backbone = Backbone.load(tiny[name], dtype="float32", device="cpu", adapters={}, vocab_size=320)
        assert is_packed is any(isinstance(layer, PackedLinear) for layer in backbone.model.modules())
        cache = RowCache()
        return torch.cat([backbone.forward([Span(cache, ids, len(ids))])[0] for ids in ([7, 50, 301, 12], [99])])

    packed = logprobs(is_packed=True)
    monkeypatch.setattr(packed_linear, "SMALLEST", 2**17)
    torch.testing.assert_close(packed, logprobs(is_packed=False), atol=1e-4, rtol=0)


def test_without_the_operators_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: PackedLinear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(packed_linear.PackedLinear, "__init__", missing)
    model = nn.Sequential(nn.Linear(8, 8))
    assert pack_linears(model) == 0
    assert type(model[0]) is nn.Linear


def test_operators_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear.PackedLinear, "forward", lambda self, x: torch.zeros(1, 3, 48))
    model = nn.Sequential(nn.Linear(8, 8))
    assert pack_linears(model) == 0
