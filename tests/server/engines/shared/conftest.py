from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.server.weights.view import Surface
from tests.conftest import make_tokenizer


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Surface(AutoTokenizer.from_pretrained(folder))
