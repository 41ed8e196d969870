"""transformers, imported without the packages that only its other uses need.

Its assisted decoding imports scikit-learn (and with it scipy, pandas and joblib), its losses for object detection
scipy: three tenths of the processor time that it takes to import the models, for code that never runs here.
"""

from __future__ import annotations

import importlib
import threading

_UNUSED = ("is_sklearn_available", "is_scipy_available")
_ASKING = ("transformers.loss.loss_utils", "transformers.generation.candidate_generator")
_TOKENIZERS = "transformers.models.auto.tokenization_auto"
_importing = threading.Lock()  # transformers imports its parts when they are named, and one thread at a time can


def import_transformers() -> None:
    """Import transformers, what asks for the packages of `_UNUSED` (they seem absent meanwhile), and its tokenizers.

    Whoever uses those packages afterwards finds them (sentence-transformers does). Many threads may call it at once.
    """
    with _importing:
        import transformers.utils

        kept = {name: getattr(transformers.utils, name) for name in _UNUSED}
        for name in _UNUSED:
            setattr(transformers.utils, name, lambda: False)
        try:
            for module in (*_ASKING, _TOKENIZERS):
                importlib.import_module(module)
        finally:
            for name, available in kept.items():
                setattr(transformers.utils, name, available)
