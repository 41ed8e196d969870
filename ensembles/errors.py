"""Every error that users meet, as one tree.

    EnsembleError
    ├── ConfigError               the YAML is wrong
    │   └── ModelLoadError        ... or what it names cannot be loaded
    ├── RequestError              the client's request is wrong: repeating it will not help
    │   ├── UnknownModelError
    │   ├── ForbiddenModelError   served, but not to this key
    │   ├── QuotaError            it would keep more than its key may
    │   ├── NotFoundError         no file or batch has the id that it names
    │   ├── ConflictError         it asks of a thing what its state does not allow
    │   ├── ContextLengthError
    │   └── UnsupportedError      valid, but this model cannot do it
    ├── OverloadedError           try again later
    │   ├── RateLimitError        its key has used what it may use in a minute, or at once
    │   └── EngineRestartingError the engine died and is being started again
    ├── StorageError              the disk is full or cannot be written
    │   ├── FolderInUseError      another process keeps its things in that folder
    │   ├── StorageBusyError      another program holds it for now
    │   └── StorageDamagedError   what was kept cannot be read any more
    ├── DeadlineError             the time that the request allowed is over
    ├── MemberError               this one generation failed on a member; the member lives
    │   ├── MemberTimeoutError    it did not answer within the time that its config allows
    │   └── TurnoutError          too few members answered
    └── EngineDeadError           the engine is gone; nothing it hosts can answer

`server.requests.errors` maps each class to an HTTP status and an OpenAI error type.
"""

from __future__ import annotations

from collections.abc import Mapping


class EnsembleError(Exception):
    """Base of all errors that this project raises on purpose."""


class ConfigError(EnsembleError, ValueError):
    """The configuration is wrong. A `ValueError`, so that pydantic collects it with its other findings."""


class ModelLoadError(ConfigError):
    """A model that the configuration names cannot be loaded or does not fit the others."""


class RequestError(EnsembleError, ValueError):
    """The request is wrong. `param` names the field at fault, as OpenAI's error object does."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(RequestError):
    """No model of that name is served."""


class ForbiddenModelError(RequestError):
    """The model is served, and the key of the request may not ask it."""


class QuotaError(RequestError):
    """With what the request brings, its key would keep more than it may."""


class NotFoundError(RequestError):
    """Nothing has the id that the request names, or it belongs to another key."""


class ConflictError(RequestError):
    """What the request names is in a state that does not allow what it asks."""


class ContextLengthError(RequestError):
    """Prompt and requested tokens do not fit into the model's context."""


class UnsupportedError(RequestError):
    """The request is valid, but this model cannot honour it."""


class OverloadedError(EnsembleError):
    """The queue is full. `retry_after_s` is a hint for the client."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(OverloadedError):
    """A key has used what it may use. `limit` says of what: "requests", "tokens" or "streams"."""

    def __init__(self, message: str, *, limit: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class EngineRestartingError(OverloadedError):
    """The engine died, and with it this generation if it had begun; it is being started again."""


class StorageError(EnsembleError):
    """What should be kept cannot be written: the disk is full, or the folder is not ours to write."""


class FolderInUseError(StorageError):
    """The folder is another process's as long as that one lives."""


class StorageBusyError(StorageError):
    """Another program holds what should be read or written; it may be free in a moment."""


class StorageDamagedError(StorageError):
    """What was kept cannot be read any more."""


class DeadlineError(EnsembleError):
    """The request's own deadline passed before an answer was there."""


class MemberError(EnsembleError):
    """One generation failed on the member named `member`."""

    def __init__(self, member: str, message: str) -> None:
        super().__init__(f"member {member!r}: {message}")
        self.member = member


class MemberTimeoutError(MemberError):
    """Nothing came from the member within the time that its own config allows."""


class TurnoutError(MemberError):
    """Fewer members answered than the ensemble's `min_turnout` asks for. `silent` maps each to its reason."""

    def __init__(self, ensemble: str, silent: Mapping[str, str], *, answered: int, required: int) -> None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in silent.items())
        super().__init__(ensemble, f"{answered} members answered, min_turnout is {required} ({reasons})")
        self.silent = dict(silent)


class EngineDeadError(EnsembleError):
    """The engine stopped on an error that it cannot recover from."""
