from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ensemble_server.ensembles.base import Gate
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.gates import identity
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.one_model.export import export
from tests.gates import a_gate

MODELS = {
    "base": {"path": "./weights"},
    "code": {"base": "base", "adapter": "./adapters/code"},
}
GATED = {"method": "probability_average", "members": ["base", "code"], "pool": "posterior", "share": 0.05}


def written(folder: Path, **changes: dict) -> Path:
    """A config whose gate stands in a file of its own, trained for `MODELS`; the models may have changed since."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": MODELS}))
    models = load_config(folder / "config.yaml").models
    named = {name: identity(models, name, folder) for name in MODELS}
    gate = a_gate(dict.fromkeys(MODELS, 1), identities=named).model_dump(mode="json")
    (folder / "mix.gate.yaml").write_text(yaml.safe_dump(gate))
    mix = GATED | {"gate": "mix.gate.yaml"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": MODELS | {"mix": mix} | changes}))
    return folder / "config.yaml"


def test_a_gate_is_read_from_its_file_and_moves_with_its_config(tmp_path: Path) -> None:
    gate = load_config(written(tmp_path / "here")).models["mix"].gate
    assert isinstance(gate, Gate)
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_config(tmp_path / "there" / "config.yaml").models["mix"].gate == gate


@pytest.mark.parametrize(
    ("member", "entry"),
    [
        ("code", {"base": "base", "adapter": "./adapters/other"}),
        ("code", {"base": "base", "adapter": "./adapters/code", "system_prompt": "Be kind."}),
        ("base", {"path": "./weights", "dtype": "float16"}),
    ],
)
def test_a_gate_for_other_weights_is_refused_by_name(tmp_path: Path, member: str, entry: dict) -> None:
    with pytest.raises(ConfigError, match=rf"models\.mix\.gate: was trained for other weights than '{member}'"):
        load_config(written(tmp_path / "here", **{member: entry}))


def test_what_does_not_change_the_weights_does_not_matter(tmp_path: Path) -> None:
    code = MODELS["code"] | {"listed": False, "tool_format": "off"}
    assert load_config(written(tmp_path / "here", code=code)).models["mix"].gate is not None


def test_a_gate_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    config = written(tmp_path / "here")
    file = config.with_name("mix.gate.yaml")
    gate = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(gate | {"features": {}}))
    with pytest.raises(ConfigError, match=r"models\.mix\.gate.*features must be entropy"):
        load_config(config)
    file.unlink()
    with pytest.raises(ConfigError, match=r"models\.mix\.gate: .*mix\.gate\.yaml"):
        load_config(config)


def test_an_exported_model_takes_no_gate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model 'mix': gate: an exported model's weights follow the text"):
        export(load_config(written(tmp_path / "here")), "mix", tmp_path / "out")
