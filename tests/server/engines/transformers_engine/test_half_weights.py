from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ensemble_server.server.engines.transformers_engine import half_weights, packed_linear
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.half_weights import (
    HalfEmbedding,
    HalfLinear,
    WeightsRule,
    halve_embeddings,
    halving,
    is_exact,
    is_supported,
    round_to_half,
)
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.packed_linear import PackedLinear, pack_linears
from tests.conftest import make_adapter

VOCAB = 320
TEXT = [7, 50, 301, 12, 12, 99, 240, 3, 64]

pytestmark = pytest.mark.skipif(not is_supported(), reason="this CPU has no fbgemm")


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(packed_linear, "SMALLEST", 0)


def stored_in_16_bits(layer: Any) -> Any:
    """`layer` in float32, with weights that a bfloat16 checkpoint could hold. Biases are kept as they are."""
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    return layer.requires_grad_(False)


def halve(model: nn.Module) -> None:
    for _ in halving(model):
        pass


@pytest.fixture(scope="module")
def bfloat16(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models as most checkpoints are stored."""
    root = tmp_path_factory.mktemp("bfloat16")
    for name in ("llama", "qwen", "gpt2", "gemma"):
        model = AutoModelForCausalLM.from_pretrained(tiny[name], dtype=torch.bfloat16)
        model.save_pretrained(root / name)
    return {name: root / name for name in ("llama", "qwen", "gpt2", "gemma")}


def load(folder: Path, weights: WeightsRule = "exact", adapters: dict[str, Path] | None = None) -> Backbone:
    return Backbone.load(
        folder, dtype="float32", device="cpu", adapters=adapters or {}, vocab_size=VOCAB, weights=weights
    )


def logprobs(backbone: Backbone, adapter: str | None = None) -> torch.Tensor:
    """Of a text that is read in two pieces, as prompts and single tokens are."""
    cache = RowCache()
    pieces = [backbone.forward([Span(cache, ids, len(ids), adapter)])[0] for ids in (TEXT[:-1], TEXT[-1:])]
    return torch.cat(pieces)


def kinds(model: nn.Module) -> set[type]:
    return {type(layer) for layer in model.modules() if isinstance(layer, (nn.Linear, PackedLinear, HalfLinear))}


# --- which weights fp16 holds ---


@pytest.mark.parametrize(
    ("weight", "exact"),
    [
        (1 + 2**-10, True),  # eleven digits
        (1 + 2**-11, False),
        (-(2.0**-24), True),  # the smallest step there is
        (2.0**-25, True),  # lost, as it is where float32 adds it to 1
        (0.25 + 2**-13, False),  # a digit too many
        (65504.0, True),
        (65536.0, False),
        (float("inf"), False),
        (float("nan"), False),
        (-0.0, True),
    ],
)
def test_weights_are_exact_in_fp16_if_it_has_digits_and_range_for_them(weight: float, exact: bool) -> None:
    assert is_exact(torch.tensor([[1.0, weight]])) is exact


def test_what_fp16_does_to_tiny_weights_counts_beside_the_largest() -> None:
    assert is_exact(torch.tensor([0.25, 3e-6]))
    assert not is_exact(torch.tensor([1e-2, 3e-6]))


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 65])
@pytest.mark.parametrize("packs", [True, False], ids=["behind onednn", "plain"])
@pytest.mark.parametrize("layer", [nn.Linear(32, 48), nn.Linear(32, 7, bias=False), Conv1D(48, 32)], ids=str)
def test_a_halved_layer_computes_what_the_layer_does(layer: nn.Module, packs: bool, rows: int) -> None:
    model = nn.Sequential(stored_in_16_bits(layer))
    x = torch.randn(1, rows, 32)
    expected = model(x)
    if packs:
        pack_linears(model)
    halve(model)
    assert type(model[0]) is HalfLinear
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_strided_input_is_read_rightly() -> None:
    model = nn.Sequential(stored_in_16_bits(nn.Linear(32, 8)))
    x = torch.randn(1, 32, 5).transpose(1, 2)
    expected = model(x)
    halve(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_wide_layer_is_packed_in_pieces_and_replaced_when_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_weights, "PIECE", 20)
    model = nn.Sequential(stored_in_16_bits(nn.Linear(32, 48)))
    x = torch.randn(1, 3, 32)
    expected = model(x)
    types = []
    for _ in halving(model):
        types.append(type(model[0]))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert types == [nn.Linear] * 3
    assert type(model[0]) is HalfLinear
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_what_fp16_would_change_stays_float32_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    fits, does_not = stored_in_16_bits(nn.Linear(32, 8)), nn.Linear(8, 8)
    does_not.weight.data[0, 0] = 1 + 2**-11
    model = nn.Sequential(fits, does_not)
    pack_linears(model)
    with caplog.at_level(logging.INFO):
        halve(model)
    assert [type(layer) for layer in model] == [HalfLinear, PackedLinear]
    assert "1 linear layers of Sequential are kept as fp16;" in caplog.text
    assert "1 layers, by at most 0.00049 (in .1)" in caplog.text


def test_rounding_changes_no_weight_by_more_than_it_says_and_leaves_what_is_beyond_its_range() -> None:
    model: Any = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model[2].weight[0, 0] = 1e6
    before = [layer.weight.clone() for layer in model]
    rounding = round_to_half(model)
    changes = [float((layer.weight - old).abs().max()) for layer, old in zip(model, before, strict=True)]
    assert rounding is not None
    assert rounding.num_layers == 2
    assert rounding.deviation == max(changes[:2]) > 0
    assert changes[2] == 0
    assert is_exact(model[0].weight) and is_exact(model[1].weight)
    assert round_to_half(model) is None


def test_an_embedding_gives_the_numbers_it_gave_and_shares_nothing_with_a_halved_head() -> None:
    model: Any = nn.Module()
    model.embed, model.head = stored_in_16_bits(nn.Embedding(10, 8)), nn.Linear(8, 10, bias=False)
    model.head.weight = model.embed.weight
    before = model.embed.weight.clone()
    pack_linears(model)
    assert halve_embeddings(model) == 1
    halve(model)
    assert (type(model.embed), type(model.head)) == (HalfEmbedding, HalfLinear)
    assert torch.equal(model.embed(torch.arange(10)), before)
    torch.testing.assert_close(model.head(model.embed(torch.tensor([3]))), before[[3]] @ before.T)
    assert (model.embed.weight.shape, model.embed.weight.dtype) == (before.shape, torch.float32)


def test_embeddings_that_do_more_than_look_up_stay() -> None:
    class Scaled(nn.Embedding):
        pass

    model = nn.Sequential(Scaled(4, 4), nn.Embedding(4, 4, max_norm=1), nn.Embedding(4, 4, dtype=torch.bfloat16))
    for layer in model:
        stored_in_16_bits(layer)
    assert halve_embeddings(model) == 0


# --- whole models ---


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2", "gemma"])
def test_a_model_stored_in_16_bits_gives_the_same_distributions_from_fp16(bfloat16: dict[str, Path], name: str) -> None:
    backbone = load(bfloat16[name])
    before = logprobs(backbone)
    for _ in backbone.halving():
        torch.testing.assert_close(logprobs(backbone), before, atol=1e-4, rtol=0)
    assert kinds(backbone.model) == {HalfLinear}
    torch.testing.assert_close(logprobs(backbone), before, atol=1e-4, rtol=0)
    assert backbone.model.dtype == torch.float32


def test_adapters_stand_on_halved_layers(bfloat16: dict[str, Path], tmp_path: Path) -> None:
    adapters = {"red": make_adapter(tmp_path / "red", bfloat16["llama"], seed=1, rank=4)}
    backbone = load(bfloat16["llama"], adapters=adapters)
    before = {adapter: logprobs(backbone, adapter) for adapter in (None, "red")}
    for _ in backbone.halving():
        pass
    assert kinds(backbone.model) == {HalfLinear}
    assert (before[None] - before["red"]).abs().max() > 1e-3
    for adapter, expected in before.items():
        torch.testing.assert_close(logprobs(backbone, adapter), expected, atol=1e-4, rtol=0)


def test_a_model_of_float32_weights_is_rounded_only_where_the_config_says_so(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    exact, full = load(tiny["llama"]), load(tiny["llama"], "full")
    with caplog.at_level(logging.INFO):
        half = load(tiny["llama"], "half")
    assert "weights rounded to fp16" in caplog.text and "nats at most" in caplog.text
    for backbone in (exact, half, full):
        for _ in backbone.halving():
            pass
    assert kinds(exact.model) == kinds(full.model) == {PackedLinear}
    assert kinds(half.model) == {HalfLinear}
    torch.testing.assert_close(logprobs(exact), logprobs(full), atol=0, rtol=0)
    assert 0 < (logprobs(half) - logprobs(full)).abs().max() < 1e-2


def test_full_weights_stay_full_even_where_fp16_holds_them(bfloat16: dict[str, Path]) -> None:
    backbone = load(bfloat16["llama"], "full")
    for _ in backbone.halving():
        pass
    assert kinds(backbone.model) == {PackedLinear}
    assert not any(isinstance(layer, HalfEmbedding) for layer in backbone.model.modules())


# --- without the operators ---


def test_without_the_operators_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack_fp16")

    monkeypatch.setattr(half_weights, "_packed", missing)
    monkeypatch.setattr(half_weights, "is_supported", is_supported.__wrapped__)  # the verdict is kept for good
    model = nn.Sequential(stored_in_16_bits(nn.Linear(8, 8)))
    pack_linears(model)
    halve(model)
    assert type(model[0]) is PackedLinear


def test_a_layer_that_would_compute_something_else_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(stored_in_16_bits(nn.Linear(8, 8)))
    pack_linears(model)
    monkeypatch.setattr(HalfLinear, "forward", lambda self, x: torch.zeros(1, 2, 8))
    with pytest.raises(ArithmeticError, match="computes something else"):
        halve(model)
    assert type(model[0]) is PackedLinear
