"""What generations cost a key, charged while they run (`requests.generation.Observer`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensemble_server.server.requests.generation import Relay

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import Usage
    from ensemble_server.server.limits.account import Account
    from ensemble_server.server.requests.generation import Observer


class Spending(Relay):
    """Charges an account for one body, and passes all on to another observer.

    A prompt is charged when it is read and a piece when it comes, so that a long answer counts while it is written, and
    one that is broken off has cost what it came to. At the end the answer's own count takes their place.
    """

    def __init__(self, account: Account, then: Observer) -> None:
        super().__init__(then)
        self._account = account
        self._model = ""
        self._num_read = 0
        self._num_written = 0

    def began(self, model: str) -> None:
        self._model = model
        super().began(model)

    def read(self, num_tokens: int = 0, waited_s: float | None = None) -> None:
        self._num_read += num_tokens
        self._account.charge(num_tokens)
        super().read(num_tokens, waited_s)

    def token(self, prompt: int, choice: int) -> None:
        self._num_written += 1
        self._account.charge(1)
        super().token(prompt, choice)

    def ended(self, usage: Usage | None) -> None:
        num_read, num_written = self._num_read, self._num_written
        if usage is not None:
            num_read, num_written = usage.prompt_tokens, usage.completion_tokens
            self._account.charge(num_read + num_written - self._num_read - self._num_written)
        if num_read or num_written:
            self._account.note_usage(self._model, num_read, num_written)
        super().ended(usage)
