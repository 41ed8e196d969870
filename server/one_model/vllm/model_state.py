"""The requests' mixtures under vLLM's V2 model runner: a buffer that every forward reads, also from a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from ensemble_server.server.one_model.vllm.live_requests import request_of_token
from ensemble_server.server.one_model.vllm.rows import columns_of, kind_of


class EnsembleState(DefaultModelState):
    """`LiveRequests` of the V2 runner, too: it tells the kinds; the columns go straight into the forward."""

    def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
        """model: the `EnsembleForCausalLM` that names this class, and so cannot be imported here."""
        super().__init__(vllm_config, model, encoder_cache, device)
        self._directory = model.directory
        default = torch.tensor(columns_of(self._directory.default), dtype=torch.float32, device=device)
        self._by_request = default.repeat(self.max_num_reqs, 1)  # (requests, K + 2), by the runner's request index
        self._by_token = default.repeat(self.max_num_tokens, 1)  # (T, K + 2)
        self._kind_of: dict[str, int] = {}  # by request id
        self._default_kind = kind_of(self._directory.default)
        model.follow_requests(self)

    @property
    def kinds(self) -> frozenset[int]:
        return frozenset(self._kind_of.values()) or frozenset({self._default_kind})

    def columns(self) -> None:
        """None: this runner hands the columns to the forward itself."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        mixture = self._directory.of_request(params.extra_args if params is not None else None)
        self._by_request[req_index] = torch.tensor(columns_of(mixture), dtype=torch.float32).to(self.device)
        self._kind_of[new_req_data.req_id] = kind_of(mixture)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._kind_of.pop(req_id, None)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        num_tokens = input_batch.num_tokens_after_padding
        by_request = self._by_request[input_batch.idx_mapping.long()]
        starts = input_batch.query_start_loc[: len(by_request) + 1]
        self._by_token[:num_tokens] = by_request[request_of_token(starts, num_tokens)]
        return super().prepare_inputs(input_batch, req_states) | {"columns": self._by_token[:num_tokens]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | {"columns": self._by_token[:num_tokens]}
