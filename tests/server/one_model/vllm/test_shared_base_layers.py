"""The layers of a shared base one by one: changes split over tensor-parallel ranks, and bases that are refused."""

from __future__ import annotations

from typing import ClassVar

import pytest

pytest.importorskip("vllm")

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.one_model.vllm.shared_base_adapters import LowRank
from ensemble_server.server.one_model.vllm.shared_base_layers import (
    LowRankRows,
    add_changes,
    members_as_heads,
    put_side_by_side,
)

pytestmark = pytest.mark.vllm

HIDDEN, HEAD, INNER = 8, 4, 6
PARTS = {"q_proj": 2 * HEAD, "k_proj": HEAD, "v_proj": HEAD, "gate_proj": INNER, "up_proj": INNER, "o_proj": HIDDEN}


class Block(nn.Module):
    """Two query heads on one for keys and values, and half of an MLP: all kinds of linear layers."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, 2, 1, bias=False)
        self.block.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False)
        self.block.o_proj = linear.RowParallelLinear(2 * HEAD, HIDDEN, bias=False, reduce_results=False)
        for layer in self.block.children():
            layer.weight.data.zero_()


@pytest.fixture
def rank_of(monkeypatch):
    """Builds a block as one of several tensor-parallel ranks would, with weights of zero and the members' changes."""

    def build(members, rank=0, num_ranks=1):
        monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: num_ranks)
        monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: num_ranks)
        with set_current_vllm_config(VllmConfig()):
            block = Block()
            add_changes(block, members, [f"m{index}" for index in range(len(members))])
        for layer in block.block.children():
            layer.quant_method.process_weights_after_loading(layer)
        return block.block

    return build


@pytest.fixture
def members():
    """The base itself, one that changes every layer, and one of another rank that changes two."""
    torch.manual_seed(0)

    def change(name, rank):
        return LowRank(torch.randn(rank, HIDDEN), torch.randn(PARTS[name], rank))

    every = {f"block.{name}": change(name, 2) for name in PARTS}
    return [{}, every, {f"block.{name}": change(name, 3) for name in ("v_proj", "o_proj")}]


def alone(member, part, x):
    change = member.get(f"block.{part}")
    return x.new_zeros(len(x), PARTS[part]) if change is None else x @ change.a.T @ change.b.T


def applied(layer, rows, num_members):
    """(T * K, in) -> (T, K, out)"""
    return layer.quant_method.apply(layer, rows).view(-1, num_members, sum(layer.output_partition_sizes))


LAYERS = {**Block.packed_modules_mapping, "o_proj": ["o_proj"]}


@pytest.mark.parametrize("layer", LAYERS)
def test_each_row_gets_the_change_of_its_own_member(layer, rank_of, members):
    rows = torch.randn(4 * len(members), HIDDEN)
    found = applied(getattr(rank_of(members), layer), rows, len(members))
    for index, member in enumerate(members):
        x = rows.view(4, len(members), -1)[:, index]
        expected = torch.cat([alone(member, part, x) for part in LAYERS[layer]], dim=1)
        torch.testing.assert_close(found[:, index], expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_share_of_the_outputs(rank, rank_of, members):
    rows = torch.randn(4 * len(members), HIDDEN)
    whole, split = rank_of(members), rank_of(members, rank, 2)
    q, k, v = applied(whole.qkv_proj, rows, len(members)).split([2 * HEAD, HEAD, HEAD], dim=-1)
    expected = torch.cat([q[..., rank * HEAD :][..., :HEAD], k, v], dim=-1)  # one head for keys: both ranks have it
    torch.testing.assert_close(applied(split.qkv_proj, rows, len(members)), expected)
    gate, up = applied(whole.gate_up_proj, rows, len(members)).split(INNER, dim=-1)
    half = slice(rank * INNER // 2, (rank + 1) * INNER // 2)
    expected = torch.cat([gate[..., half], up[..., half]], dim=-1)
    torch.testing.assert_close(applied(split.gate_up_proj, rows, len(members)), expected)


def test_what_ranks_add_up_to_is_the_whole_where_inputs_are_split(rank_of, members):
    rows = torch.randn(4 * len(members), HIDDEN)
    halves = [
        applied(rank_of(members, rank, 2).o_proj, half, len(members)) for rank, half in enumerate(rows.chunk(2, dim=1))
    ]
    torch.testing.assert_close(sum(halves), applied(rank_of(members).o_proj, rows, len(members)))


def test_layers_that_no_member_changes_stay_as_they_are(rank_of, members):
    block = rank_of([{}, {"block.o_proj": members[2]["block.o_proj"]}])
    assert isinstance(block.o_proj.quant_method, LowRankRows)
    assert isinstance(block.qkv_proj.quant_method, linear.UnquantizedLinearMethod)


def test_a_change_to_anything_else_is_refused(rank_of):
    with pytest.raises(ModelLoadError, match="'m1' changes lm_head, which is no linear layer"):
        rank_of([{}, {"lm_head": LowRank(torch.ones(1, HIDDEN), torch.ones(9, 1))}])


def test_a_base_that_keeps_state_of_another_kind_is_refused():
    class State(nn.Module, AttentionLayerBase):
        def get_attn_backend(self): ...

        def get_kv_cache_spec(self, vllm_config): ...

    base = nn.Module()
    base.mixer = State()
    with pytest.raises(ModelLoadError, match="cannot share mixer, a State"):
        put_side_by_side(base, 2)


def test_attention_built_afterwards_has_the_heads_that_it_is_given():
    from vllm.model_executor.layers.attention import Attention

    build = Attention.__init__
    with pytest.raises(RuntimeError), members_as_heads(3):
        assert Attention.__init__ is not build
        raise RuntimeError
    assert Attention.__init__ is build
