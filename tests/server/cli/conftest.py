from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ensemble_server.server.cli.app import main
from tests.conftest import make_tokenizer


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def ensemble(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`ensemble("models", file)` runs that command line in this process."""

    def run(*arguments: str | Path) -> Run:
        monkeypatch.setattr("sys.argv", ["ensemble", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setenv("TQDM_DISABLE", "")  # off: what `main` would set is for processes of its own
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return Run(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that looks like a Llama: 2 layers, 2 of 4 heads hold keys, head size 8, 1024 parameters in float16."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    others = {"model_type": "llama", "vocab_size": 336, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(shape | others), encoding="utf-8")
    make_tokenizer(folder)
    save_file({"a": np.zeros((10, 100), np.float16), "b": np.zeros(24, np.float16)}, folder / "model.safetensors")
    return folder
