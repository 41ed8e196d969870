from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ensemble_server.server.cli.model_table import print_table
from ensemble_server.server.config.gates import identity
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.inventory import take_inventory
from ensemble_server.server.rehearsal import rehearse
from tests.gates import a_gate
from tests.server.cli.conftest import Run
from tests.server.engines.transformers_engine.vocabularies import word_piece


@pytest.fixture
def config(checkpoint: Path) -> Path:
    adapter = checkpoint.parent / "expert"
    adapter.mkdir()
    save_file({"lora": np.zeros(50, np.float16)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
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


def test_of_a_gate_it_is_shown_that_there_is_one(ensemble: Callable[..., Run], config: Path) -> None:
    models = load_config(config).models
    named = {name: identity(models, name, config.parent) for name in ("base", "tuned")}
    gate = a_gate({"base": 1, "tuned": 2}, 0.01, identities=named).model_dump(mode="json")
    config.with_name("gate.yaml").write_text(json.dumps(gate))
    config.write_text(config.read_text().replace("share: 0.01", "share: 0.01, gate: gate.yaml"))
    assert row(ensemble("models", config), "mix")[3] == "pool=posterior share=0.01 gate=True"
    shown = {model["name"]: model for model in json.loads(ensemble("models", config, "--json").out)["models"]}
    assert shown["mix"]["settings"] == {"pool": "posterior", "share": 0.01, "gate": True}


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


def test_a_bound_of_the_caches_is_what_they_take_at_most(ensemble: Callable[..., Run], config: Path) -> None:
    config.write_text(config.read_text().replace("max_batch: 4", "max_batch: 64, kv_cache_mb: 1"))
    run = ensemble("models", str(config))
    assert "at most 1.0 MB with 64 of them (engine.max_batch)" in run.out
    assert "or what engine.kv_cache_mb allows" in run.out


def test_a_model_that_is_not_there_fails_and_the_others_are_shown(ensemble: Callable[..., Run], config: Path) -> None:
    (config.parent / "expert" / "adapter_model.safetensors").unlink()
    run = ensemble("models", config)
    assert run.code == 1
    assert run.err.startswith("error: model 'tuned': ")
    assert "needs adapter_config.json and adapter_model.safetensors" in run.err
    assert row(run, "base")[4] == "1.0 k"
    assert row(run, "tuned")[4] == ""


# --- what can be known is said, and nothing else breaks ---


def refused(ensemble: Callable[..., Run], folder: Path, text: str) -> str:
    """What `ensemble models` says of a config with these models."""
    file = folder / "wrong.yaml"
    file.write_text(f"models:\n{text}", encoding="utf-8")
    run = ensemble("models", file)
    assert run.code == 1
    assert "Traceback" not in run.err and all(line.startswith("error: model ") for line in run.err.splitlines())
    return run.err


@pytest.mark.parametrize("path", ["some-org/some-model-7b", "./not-there", "some-org/deeper/x", "/no/such.gguf"])
def test_a_path_or_hub_id_that_is_not_there_is_named(ensemble: Callable[..., Run], tmp_path: Path, path: str) -> None:
    said = refused(ensemble, tmp_path, f"  a: {{path: {path}}}\n")
    assert said.startswith("error: model 'a': ") and path.lstrip("./") in said


def test_every_model_that_cannot_be_served_is_named_at_once(
    ensemble: Callable[..., Run], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    word_piece(shutil.copytree(checkpoint, checkpoint.parent / "words"))
    said = refused(
        ensemble,
        checkpoint.parent,
        "  a: {path: tiny}\n"
        "  b: {path: tiny}\n"
        "  c: {path: words}\n"
        "  gone: {path: ./gone}\n"
        "  far: {path: tiny, device: 'cuda:77'}\n"
        "  away: {url: 'http://127.0.0.1:1/v1', api_key_env: NO_SUCH_KEY}\n"
        "  near: {url: 'http://127.0.0.1:1/v1'}\n"
        "  two: {method: probability_average, members: [a, near]}\n"
        "  mixed: {method: probability_average, members: [b, c]}\n"
        "  needs_gone: {method: crowd_vote, members: [a, gone], similarity: {rouge_l_word: 1}}\n"
        "  nest: {method: probability_average, members: [inner]}\n"
        "  inner: {method: probability_average, members: [a]}\n"
        "  judged: {method: ranking, members: [a], judge: near}\n"
        "  crossed: {method: ranking, members: [a], cross_encoder: ./no-cross-encoder}\n",
    )
    named = [line.split("'")[1] for line in said.splitlines()]
    assert named == ["gone", "far", "away", "two", "mixed", "nest", "judged", "crossed"]  # and none for another's sake
    for part in (
        "cuda:77",
        "NO_SUCH_KEY",
        "not next-token distributions",
        "cannot be averaged over text",
        "average itself",
    ):
        assert part in said


def test_a_vote_by_embeddings_needs_the_embedding_model(ensemble: Callable[..., Run], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    crowd = "{method: crowd_vote, members: [a], similarity: {embedding: 1}}"
    file.write_text(
        f"models: {{a: {{url: 'http://127.0.0.1:1/v1'}}, crowd: {crowd}}}\nembedding: {{path: ./nowhere}}\n"
    )
    run = ensemble("models", file)
    assert run.code == 1
    assert "model 'crowd': " in run.err and "nowhere' is not there" in run.err


def test_json_holds_what_the_table_shows(ensemble: Callable[..., Run], config: Path) -> None:
    run = ensemble("models", config, "--json")
    assert (run.code, run.err) == (0, "")
    told = json.loads(run.out)
    models = {model["name"]: model for model in told["models"]}
    assert list(models) == ["base", "twin", "tuned", "asked", "away", "mix"]
    assert models["base"]["parameters"] == 1024 and models["base"]["weights_bytes"] == 4096
    assert models["base"]["kv_cache_bytes"] == 32768 and models["base"]["vocabulary"] == 320
    assert models["mix"]["settings"] == {"pool": "posterior", "share": 0.01}
    assert models["away"]["parameters"] is None and not models["twin"]["listed"]
    assert told["total"] == {"weights_bytes": 4296, "kv_cache_bytes": 524288, "max_batch": 4}
    assert told["problems"] == []


@pytest.mark.parametrize("columns", [44, 80])
def test_narrow_terminals_get_a_paragraph_per_model_and_no_line_too_long(
    config: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes the output for a terminal
    loaded = load_config(config)
    print_table(take_inventory(loaded, rehearse(loaded)))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= columns
    assert "base  hosted" in lines and "mix  probability_average" in lines and "twin (hidden)  hosted" in lines
    words = " ".join(" ".join(lines).split())
    assert "1.0 k parameters, 4.1 kB; KV cache 32.8 kB, context 128" in words
    assert "pool=posterior share=0.01" in words
