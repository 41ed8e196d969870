from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.server.cli.conftest import Run


@pytest.fixture
def config(checkpoint: Path) -> Path:
    adapter = checkpoint.parent / "expert"
    adapter.mkdir()
    save_file({"lora": np.zeros(50, np.float16)}, adapter / "adapter_model.safetensors")
    file = checkpoint.parent / "c.yaml"
    file.write_text(
        "models:\n"
        "  base: {path: tiny, dtype: float32}\n"
        "  twin: {path: ./tiny, dtype: float32, listed: false}\n"
        "  tuned: {base: base, adapter: expert}\n"
        "  asked: {base: base, system_prompt: 'Be brief.'}\n"
        "  away: {url: 'http://127.0.0.1:1/v1'}\n"
        "  mix: {method: probability_average, members: {base: 1, tuned: 2}, pool: posterior, share: 0.01}\n"
        "engine: {max_batch: 4}\n",
        encoding="utf-8",
    )
    return file


def row(run: Run, name: str) -> list[str]:
    return next(
        [cell.strip() for cell in line.split("│")[1:-1]] for line in run.out.splitlines() if f"│ {name} " in line
    )


def test_each_model_is_shown_with_its_size(ensemble: Callable[..., Run], config: Path) -> None:
    run = ensemble("models", config)
    assert (run.code, run.err) == (0, "")
    # 1024 parameters x 4 bytes; cache: 2 x 2 layers x 2 heads x 8 numbers x 128 tokens x 4 bytes = 32768 bytes
    tiny = str(config.parent / "tiny")
    assert row(run, "base") == ["base", "hosted", tiny, "dtype=float32", "1.0 k", "4.1 kB", "32.8 kB", "128"]
    assert row(run, "twin")[0] == "twin (hidden)"
    assert row(run, "tuned") == ["tuned", "adapter", "base + expert", "", "50", "200 B", "32.8 kB", "128"]
    assert row(run, "asked") == ["asked", "view", "base", "system_prompt=Be brief.", "0", "0 B", "32.8 kB", "128"]
    assert row(run, "away")[:3] == ["away", "remote", "http://127.0.0.1:1/v1"]
    assert row(run, "mix")[1:4] == ["probability_average", "base, tuned x2", "pool=posterior share=0.01"]


def test_the_cache_of_quantised_weights_is_not_quantised(ensemble: Callable[..., Run], checkpoint: Path) -> None:
    save_file({"weight": np.zeros(1024, np.int8)}, checkpoint / "model.safetensors")
    config = checkpoint.parent / "c.yaml"
    config.write_text("models: {base: {path: tiny}}\n", encoding="utf-8")
    run = ensemble("models", config)
    assert row(run, "base")[4:] == ["1.0 k", "1.0 kB", "16.4 kB", "128"]  # 8192 numbers of 16 bits


def test_weights_that_two_entries_share_count_once(ensemble: Callable[..., Run], config: Path) -> None:
    run = ensemble("models", config)
    assert "Weights: 4.3 kB in all." in run.out  # 4096 + 200
    assert "at most 524.3 kB with 4 of them" in run.out  # 32768 x 4 members x 4 sequences


def test_a_model_that_is_not_there_fails_and_the_others_are_shown(ensemble: Callable[..., Run], config: Path) -> None:
    (config.parent / "expert" / "adapter_model.safetensors").unlink()
    run = ensemble("models", config)
    assert run.code == 1
    assert run.err.startswith("error: model 'tuned': ")
    assert "holds no *.safetensors" in run.err
    assert row(run, "base")[4] == "1.0 k"
    assert row(run, "tuned")[4] == ""
