"""In vLLM an ensemble is one model, so its members read one prompt of one vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.vocabularies import check_shared_vocabulary


def check_one_model(mixture: Mixture, views: Sequence[MemberView]) -> None:
    """Raise `ModelLoadError` unless these members of a mixture can be one model there."""
    if mixture.vocabulary == "bytes":
        raise ModelLoadError(
            "vocabulary: bytes: vLLM averages over tokens only; use engine.kind transformers to average over text"
        )
    if mixture.when is not None:
        raise ModelLoadError(
            "when: vLLM runs all members at every token; leave it out, or use engine.kind transformers to ask them "
            "only where they are needed"
        )
    if mixture.gate is not None:
        raise ModelLoadError(
            "gate: vLLM keeps the members' distributions in its own process, where nothing learnt weighs them; leave "
            "it out, or use engine.kind transformers"
        )
    try:
        check_shared_vocabulary(views)
    except ModelLoadError as exc:
        raise ModelLoadError(f"{exc}; engine.kind transformers averages such members over text") from exc
    first, *others = views
    for other in others:
        for key in ("system_prompt", "chat_template", "template_kwargs"):
            if getattr(first.surface, key) != getattr(other.surface, key):
                raise ModelLoadError(
                    f"members {first.name!r} and {other.name!r} differ in their {key}; in vLLM an ensemble is one "
                    "model that reads one prompt: give them the same, or use engine.kind transformers"
                )
