"""What the routes of one application share. Routes are declared once per process and look it up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from starlette.requests import Request

from ensemble_server.server.api.admission import Admission
from ensemble_server.server.api.arrival import Bodies
from ensemble_server.server.api.auth import account_of
from ensemble_server.server.batch.uploads.service import BatchService
from ensemble_server.server.limits.accounts import Accounts
from ensemble_server.server.requests.classify import Priors
from ensemble_server.server.requests.openai_responses.stored import StoredResponses
from ensemble_server.server.requests.protocol import ParameterCheck

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import ServerConfig
    from ensemble_server.server.hosting import Hosting
    from ensemble_server.server.metrics import Metrics


@dataclass(frozen=True)
class Context:
    hosting: Hosting
    metrics: Metrics
    admission: Admission
    batches: BatchService
    parameters: ParameterCheck
    stored: StoredResponses
    accounts: Accounts
    priors: Priors = field(default_factory=Priors)
    bodies: Bodies = field(default_factory=Bodies)

    @property
    def config(self) -> ServerConfig:
        return self.hosting.config.server


def context_of(request: Request) -> Context:
    """Of the application that `request` came to, with the house as its key sees it."""
    context: Context = request.app.state.context
    account = account_of(request)
    if account is None or account.limits.models is None:
        return context
    return replace(context, hosting=account.house(context.hosting))


async def check_open(request: Request) -> None:
    """Raise 503 if the server is shutting down. A FastAPI dependency, for what needs no model."""
    context_of(request).admission.check_open()


async def check_ready(request: Request) -> None:
    """Raise 503 unless requests can be answered now. A FastAPI dependency."""
    context_of(request).admission.check()
