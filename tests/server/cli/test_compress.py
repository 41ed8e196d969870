from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.engines.vllm_engine.placement import placements
from tests.conftest import SAMPLE
from tests.server.cli.conftest import Run
from tests.server.deltas.conftest import make_finetune

Ensemble = Callable[..., Run]


@pytest.fixture(scope="module")
def tuned(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finetune(tmp_path_factory.mktemp("tuned"), tiny["llama"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(SAMPLE)
    return file


def test_methods_and_budgets_are_compared_in_a_table(
    tuned: Path, tiny: dict[str, Path], text: Path, ensemble: Ensemble
) -> None:
    run = ensemble(
        "compress", tuned, "--base", tiny["llama"], *("-m", "svd", "-m", "bitdelta"),
        *("--budget", "1/4", "--budget", "1/2"), "--text", text,
    )  # fmt: skip
    assert run.code == 0, run.err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in run.out.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [["svd", "1/4"], ["svd", "1/2"], ["bitdelta", "1/4"], ["bitdelta", "1/2"]]
    assert "rank" in rows[0][-1] and "planes" in rows[2][-1]
    assert "KL in nats per token" in run.out
    assert "are kept as they are" in run.out


def test_a_delta_is_written_with_its_figures_as_json(
    tuned: Path, tiny: dict[str, Path], text: Path, tmp_path: Path, ensemble: Ensemble
) -> None:
    out = tmp_path / "deltas" / "math"
    run = ensemble(
        "compress", tuned, "--base", tiny["llama"], "--method", "delta-come", "--budget", "1/4",
        "--text", text, "--calibrate", text, "--out", out, "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    told = json.loads(run.out)
    [delta] = told["deltas"]
    assert delta["bytes"]["total"] == delta["bytes"]["matrices"] + delta["bytes"]["kept"]
    assert set(delta["loss"]) >= {"kl_mean", "kl_p99", "same_argmax", "bpb"}
    facts = json.loads((out / "delta.json").read_text())
    assert facts.items() >= delta.items()
    assert facts["finetune"] == str(tuned)
    assert any(f"delta: {out}" in note for note in told["notes"])
    assert "decomposing" in run.err and "writing" in run.err


def test_a_config_with_a_delta_tells_its_size_and_vllm_refuses_it_by_name(
    tuned: Path, tiny: dict[str, Path], tmp_path: Path, ensemble: Ensemble
) -> None:
    out = tmp_path / "math"
    run = ensemble("compress", tuned, "--base", tiny["llama"], "--method", "dare", "--out", out, "--json")
    assert run.code == 0, run.err
    config = tmp_path / "config.yaml"
    models = f"models: {{base: {{path: {tiny['llama']}}}, math: {{base: base, delta: math}}}}"
    config.write_text(models)
    shown = json.loads(ensemble("models", config, "--json").out)
    base, math = shown["models"]
    assert (math["kind"], math["made_of"]) == ("delta", "base + math")
    sizes = json.loads(run.out)["deltas"][0]["bytes"]
    assert sizes["total"] < math["weights_bytes"] < 4 * sizes["total"]
    assert shown["total"]["weights_bytes"] == base["weights_bytes"] + math["weights_bytes"]
    loaded = load_config(config)
    with pytest.raises(
        ModelLoadError, match=r"model 'math': a delta of method dare runs in the transformers engine only"
    ):
        placements(loaded.models, {"base": tiny["llama"]})


def test_another_chat_template_is_written_down_and_told(
    tiny: dict[str, Path], tmp_path: Path, ensemble: Ensemble
) -> None:
    tuned = make_finetune(tmp_path / "tuned", tiny["llama"])
    (tuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run = ensemble("compress", tuned, "--base", tiny["llama"], "--out", tmp_path / "delta", "--budget", "1")
    assert run.code == 0, run.err
    assert f"add chat_template: {tmp_path / 'delta' / 'chat_template.jinja'}" in run.out
    assert (tmp_path / "delta" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert "--vectors base --embeddings base it would be a LoRA adapter" in run.out


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--method", "zip"], 1, "no method 'zip'"),
        (["--budget", "lots"], 1, "is no number"),
        (["--budget", "1/1000000"], 1, "nothing of svd fits"),
        (["--method", "dare", "--calibrate", "TEXT"], 1, "nothing to calibrate"),
        (["--method", "svd", "--method", "dare", "--out", "new"], 2, "one method and one budget are written"),
        (["--out", "FULL"], 2, "is there already and not empty"),
        (["--base", "nowhere/at-all"], 1, "nowhere/at-all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_and_nothing_written(
    tuned: Path,
    tiny: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ensemble: Ensemble,
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"TEXT": str(text), "FULL": str(tuned)}
    run = ensemble("compress", tuned, "--base", tiny["llama"], *(places.get(word, word) for word in arguments))
    assert run.code == code
    assert complaint in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
