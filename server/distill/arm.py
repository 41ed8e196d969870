"""A student as an arm of a comparison: taught once, then taken from the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.blocks import Config, HostedModel
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.distill.run import distill, fingerprint
from ensemble_server.server.weights.checkpoints import cache_folder

_PARTS = 10  # of a training that are told


def distilled_entry(config: Config, wanted: Distillation, say: Callable[[str], None]) -> Mapping[str, Any]:
    """The student's entry for `config`. Blocks, for as long as it learns. `say` hears what is being done.

    Raises `ConfigError` for what cannot be taught.
    """
    for name in (wanted.ensemble, wanted.student):
        if name not in config.models:
            raise ConfigError(f"distill: there is no model {name!r}")
    if wanted.init_path is not None and wanted.init not in config.models and not wanted.full:
        raise ConfigError(
            f"distill: init {wanted.init_path.name} is a merge, and an arm's adapter stands on a model of the config; "
            "name what `ensemble merge` makes of it there and take it as the student, or give `full: true`"
        )
    out = cache_folder() / "distilled" / fingerprint(config, wanted)
    out.parent.mkdir(parents=True, exist_ok=True)
    card = distill(config, wanted, out, _Saying(say))
    if card.is_adapter:
        return {"base": card.base, "adapter": str(out)}
    base = config.models[card.base]
    assert isinstance(base, HostedModel), "a student has weights"
    return {"path": str(out), "dtype": base.dtype}


class _Saying:
    """Passes on stages, and a tenth of a training at a time."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._losses: str | None = None
        self._told = 0

    def stage(self, text: str) -> None:
        self._losses, self._told = None, 0
        self._say(text)

    def losses(self, clm: float, kl: float | None) -> None:
        self._losses = f"text {clm:.3f}" + ("" if kl is None else f", teacher {kl:.3f}")

    def progress(self, done: int, total: int) -> None:
        part = _PARTS * done // total
        if self._losses is not None and part > self._told:
            self._told = part
            self._say(f"trained {done} of {total} steps: {self._losses}")
