from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ensemble_server.server.cli.app import app
from ensemble_server.server.config.gates import identity
from ensemble_server.server.config.loading import load_config
from tests.conftest import SAMPLE
from tests.gates import a_gate

CONFIG = """\
# What we serve.
models:
  llama: {{path: {llama}, dtype: float32}}   # the base
  red: {{base: llama, adapter: {red}}}
  mix:
    method: probability_average
    members: [llama, red]  # by guess
  product: {{method: probability_average, members: [llama, red], pool: geometric}}
  adaptive: {{method: probability_average, members: [llama, red], pool: posterior}}
"""


@pytest.fixture
def config(tiny: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(llama=tiny["llama"], red=tiny["red"]))
    (tmp_path / "dev.txt").write_text(SAMPLE.replace("\n", "\n\n") * 2)
    return path


def run(config: Path, name: str, *arguments: str):
    small = ["--window", "48", "--document-bytes", "100"]
    return CliRunner().invoke(
        app, ["fit", str(config), name, "--text", str(config.with_name("dev.txt")), *small, *arguments]
    )


def test_weights_and_their_gain_are_printed_and_nothing_is_written(config: Path) -> None:
    before = config.read_text()
    result = run(config, "mix")
    assert result.exit_code == 0, result.output
    assert "mix (arithmetic), fitted to" in result.output
    assert "documents held back, bits per byte:" in result.output
    assert "95% interval" in result.output
    assert any(word in result.output for word in ("better", "worse", "no difference shown", "inconclusive"))
    assert config.read_text() == before
    assert run(config, "mix").output == result.output


def test_weights_are_written_beside_the_config_with_its_comments(config: Path) -> None:
    before = config.read_text()
    out = config.with_name("fitted.yaml")
    assert run(config, "mix", "--out", str(out)).exit_code == 0
    assert config.read_text() == before
    changed = [line for line, old in zip(out.read_text().splitlines(), before.splitlines(), strict=True) if line != old]
    assert len(changed) == 1
    assert changed[0].endswith("}  # by guess")
    assert sum(load_config(out).models["mix"].members.values()) == pytest.approx(1, abs=1e-3)


def test_weights_are_written_in_place(config: Path) -> None:
    assert run(config, "product", "--in-place").exit_code == 0
    text = config.read_text()
    assert "# What we serve." in text
    assert set(yaml.safe_load(text)["models"]["product"]["members"]) == {"llama", "red"}


def test_of_a_posterior_pool_the_share_is_fitted(config: Path) -> None:
    result = run(config, "adaptive", "--in-place")
    assert result.exit_code == 0, result.output
    assert "share: 0, fitted" in result.output
    assert "share" in yaml.safe_load(config.read_text())["models"]["adaptive"]
    assert yaml.safe_load(config.read_text())["models"]["adaptive"]["members"] == ["llama", "red"]


def test_several_files_may_follow_one_option(config: Path) -> None:
    (config.parent / "more.txt").write_text(SAMPLE)
    assert run(config, "mix", str(config.parent / "more.txt")).exit_code == 0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mix", ["--in-place", "--out", "x.yaml"], "one of --out and --in-place"),
        ("mix", ["--out", "/elsewhere/x.yaml"], "must be in the folder"),
        ("mix", ["--free"], "only a geometric pool"),
    ],
)
def test_options_that_contradict_are_called_wrongly(config, name, arguments, message) -> None:
    result = run(config, name, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_text_is_needed(config: Path) -> None:
    result = CliRunner().invoke(app, ["fit", str(config), "mix"])
    assert result.exit_code == 2
    assert "at least one file" in result.output


def test_what_cannot_be_fitted_fails_with_the_reason(config: Path) -> None:
    result = run(config, "llama")
    assert result.exit_code == 1
    assert "only a probability_average" in str(result.exception)


# --- a gate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gated(config: Path) -> Path:
    """A config whose pool has a gate already."""
    named = {name: identity(load_config(config).models, name, config.parent) for name in ("llama", "red")}
    gate = a_gate({"llama": 1, "red": 1}, 0.0, identities=named).model_dump(mode="json")
    config.with_name("old.yaml").write_text(yaml.safe_dump(gate))
    config.write_text(config.read_text().replace("pool: posterior", "pool: posterior, gate: old.yaml"))
    return config


def test_a_gate_is_trained_judged_and_written_beside_the_config(gated: Path) -> None:
    out = gated.with_name("new.yaml")
    result = run(gated, "adaptive", "--gate", "--out", str(out))
    assert result.exit_code == 0, result.output
    for part in ("adaptive: a gate trained on", "cross-validation", "uniform", "gate less posterior", "95% interval"):
        assert part in result.output
    assert any(said in result.output for said in ("not shown to be better", "predicts this text better", "too little"))
    assert f"wrote {out.with_name('new.adaptive.gate.yaml')} and {out}" in result.output
    assert "# What we serve." in out.read_text()
    assert yaml.safe_load(out.read_text())["models"]["adaptive"]["gate"] == "new.adaptive.gate.yaml"
    old, new = (load_config(path).models["adaptive"].gate for path in (gated, out))
    assert list(new.members) == ["llama", "red"]
    assert new != old


def test_a_gate_that_learnt_nothing_is_not_written(config: Path, tiny: dict[str, Path]) -> None:
    """Two members that are one: nothing tells whom to believe."""
    config.write_text(config.read_text().replace(f"adapter: {tiny['red']}", "system_prompt: Be brief."))
    out, before = config.with_name("new.yaml"), set(config.parent.iterdir())
    said = run(config, "adaptive", "--gate")
    assert said.exit_code == 0, said.output
    assert "no gate that is better than none" in said.output
    result = run(config, "adaptive", "--gate", "--out", str(out))
    assert result.exit_code == 1
    assert "nothing is written: fit the share without --gate" in result.output
    assert set(config.parent.iterdir()) == before


def test_a_pool_with_a_gate_has_no_share_to_fit(gated: Path) -> None:
    result = run(gated, "adaptive")
    assert result.exit_code == 1
    assert "has a gate, which was trained for its share" in str(result.exception)


def test_a_gate_needs_a_posterior_pool_and_enough_documents(config: Path) -> None:
    result = run(config, "mix", "--gate")
    assert result.exit_code == 2
    assert "a gate moves the weights of a posterior pool" in " ".join(result.output.replace("│", " ").split())
    config.with_name("dev.txt").write_text("To be, or not to be.")
    result = run(config, "adaptive", "--gate")
    assert result.exit_code == 1
    assert "documents are too few" in str(result.exception)
