"""The state for vLLM's V2 model runner: its interface, and what it hands to forwards.

The runner itself needs Triton (`on_v2_runner.py` runs other tests here on it).
"""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.one_model.vllm.model import EnsembleForCausalLM
from ensemble_server.server.one_model.vllm.model_state import EnsembleState
from ensemble_server.server.one_model.vllm.request_mixture import Directory
from ensemble_server.server.one_model.vllm.rows import ARITHMETIC, BAYES, GEOMETRIC

pytestmark = pytest.mark.vllm

DIRECTORY = Directory(("a", "b"), Mixture({"a": 1.0, "b": 3.0}, "posterior"))
DEFAULT = [0.25, 0.75, BAYES, -1]
OVERRIDDEN = ("add_request", "remove_request", "prepare_inputs", "prepare_dummy_inputs")


@pytest.mark.parametrize("name", ["__init__", *OVERRIDDEN])
def test_overridden_methods_take_what_vllms_take(name):
    ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (EnsembleState, DefaultModelState))
    assert list(ours.parameters) == list(theirs.parameters)
    assert [one.kind for one in ours.parameters.values()] == [one.kind for one in theirs.parameters.values()]


def test_what_is_read_of_vllms_objects_is_there():
    assert {"req_id", "sampling_params"} <= {field.name for field in dataclasses.fields(NewRequestData)}
    assert {"idx_mapping", "query_start_loc", "num_tokens_after_padding"} <= {
        field.name for field in dataclasses.fields(InputBatch)
    }
    assert {name for name in vars(EnsembleState) if callable(getattr(EnsembleState, name))} - {
        "__init__",
        "columns",
    } == {*OVERRIDDEN}


@pytest.fixture
def state():
    """For four requests and eight tokens at a time, of a directory of two members."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_inputs_embeds_size=lambda: 8,
            dtype=torch.float32,
            max_model_len=64,
            enable_prompt_embeds=False,
            uses_mrope=False,
            is_multimodal_pruning_enabled=lambda: False,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=8),
    )
    model = SimpleNamespace(directory=DIRECTORY, follow_requests=lambda requests: followed.append(requests))
    followed = []
    state = EnsembleState(config, model, None, torch.device("cpu"))
    assert followed == [state]
    return state


def added(state, index, request, **extra):
    params = SamplingParams(extra_args={f"ensemble_{key}": value for key, value in extra.items()} or None)
    state.add_request(index, SimpleNamespace(req_id=request, sampling_params=params))


def columns_of(state, requests, lengths, padded_to):
    """What a forward gets for the requests of these indices, with so many tokens each."""
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    # The runner's buffers are longer than what a batch uses of them.
    starts = torch.cat([starts, starts[-1:].expand(4 - len(requests))])
    batch = SimpleNamespace(
        idx_mapping=torch.tensor(requests, dtype=torch.int32),
        query_start_loc=starts,
        num_tokens_after_padding=padded_to,
    )
    return state.prepare_inputs(batch, None)["columns"]


def test_every_token_has_the_mixture_of_its_request(state):
    added(state, 2, "plain")
    added(state, 0, "alone", weights=[0, 1], pool="arithmetic")
    added(state, 3, "sharp", weights=[1.5, -0.5], pool="geometric")
    assert state.kinds == {ARITHMETIC, GEOMETRIC, BAYES}
    alone, sharp = [0, 1, ARITHMETIC, -1], [1.5, -0.5, GEOMETRIC, -1]
    found = columns_of(state, [3, 0, 2], [2, 1, 3], padded_to=6)
    assert found.tolist() == [sharp, sharp, alone, DEFAULT, DEFAULT, DEFAULT]
    state.remove_request("sharp")
    assert state.kinds == {ARITHMETIC, BAYES}
    added(state, 3, "next")
    assert columns_of(state, [0, 3], [1, 1], padded_to=2).tolist() == [alone, DEFAULT]


def test_graphs_read_the_buffer_that_is_filled_before_each_replay(state):
    captured = state.prepare_dummy_inputs(2, 8)["columns"]
    assert captured.tolist() == [DEFAULT] * 8
    added(state, 1, "alone", weights=[1, 0], pool="arithmetic")
    given = columns_of(state, [1], [3], padded_to=8)
    assert given.data_ptr() == captured.data_ptr()
    assert captured[:3].tolist() == [[1, 0, ARITHMETIC, -1]] * 3


def test_the_model_takes_the_columns_and_names_its_state():
    assert EnsembleForCausalLM.get_model_state_cls(None) is EnsembleState
    assert "columns" in inspect.signature(EnsembleForCausalLM.forward).parameters
