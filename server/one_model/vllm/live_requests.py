"""Which mixtures the requests of the current forward want, read from vLLM's V1 model runner.

The runner holds every request's sampling parameters and the order of the rows; nothing is kept here that could fall
behind it, however requests are moved, preempted or left out of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from ensemble_server.server.one_model.vllm.request_mixture import Directory
from ensemble_server.server.one_model.vllm.rows import columns_of, kind_of

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class LiveRequests(Protocol):
    @property
    def kinds(self) -> frozenset[int]:
        """The kinds (`rows.py`) that occur among the rows of the current forward."""
        ...

    def columns(self) -> torch.Tensor | None:
        """(R, K + 2) of the R requests of the current forward, in its order; None if all want the directory's."""


class RunnerRequests:
    """`LiveRequests` of vLLM's V1 runner."""

    def __init__(self, runner: GPUModelRunner, directory: Directory) -> None:
        self._runner = runner
        self._directory = directory
        self._default_kinds = frozenset({kind_of(directory.default)})
        self._params: list[SamplingParams | None] = []  # of the rows that `_columns` was made for
        self._columns: torch.Tensor | None = None
        self.kinds = self._default_kinds

    def columns(self) -> torch.Tensor | None:
        batch = self._runner.input_batch
        params = [self._runner.requests[request].sampling_params for request in batch.req_ids[: batch.num_reqs]]
        is_same = len(params) == len(self._params) and all(a is b for a, b in zip(params, self._params, strict=True))
        if not is_same:
            self._params, self._columns = params, self._made(params)
        return self._columns

    def _made(self, params: list[SamplingParams | None]) -> torch.Tensor | None:
        self.kinds = self._default_kinds
        if not any(_speaks_of_mixtures(one) for one in params):
            return None
        mixtures = [self._directory.of_request(one.extra_args if one is not None else None) for one in params]
        self.kinds = frozenset(map(kind_of, mixtures))
        columns = [columns_of(mixture) for mixture in mixtures]
        return torch.tensor(columns, dtype=torch.float32, device=self._runner.device)


def request_of_token(starts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(T,): the request that each token of a forward belongs to. starts: (R + 1,), where each begins; T may be padded,
    then what is beyond the last request counts as the last one's.
    """
    tokens = torch.arange(num_tokens, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts[1:], tokens, right=True).clamp_(max=len(starts) - 2)


def _speaks_of_mixtures(params: Any) -> bool:
    return params is not None and any(key.startswith("ensemble") for key in params.extra_args or ())
