"""What is written into an ensemble directory, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.one_model.export import export
from tests.conftest import make_model


def parsed(tiny: dict[str, Path], **models):
    hosted = {"llama": {"path": str(tiny["llama"])}, "red": {"base": "llama", "adapter": str(tiny["red"])}}
    return parse_config({"models": {**hosted, **models}}, source=tiny["llama"] / "c.yaml")


MIX = {"method": "probability_average", "members": {"llama": 1, "red": 3}}


def test_config_json_names_members_weights_and_pool(tiny, tmp_path):
    export(parsed(tiny, mix=MIX), "mix", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == "ensemble"
    assert written["pool"] == "arithmetic"
    assert written["members"] == [
        {"name": "llama", "path": str(tiny["llama"]), "adapter": None, "dtype": "auto", "weight": 1.0},
        {"name": "red", "path": str(tiny["llama"]), "adapter": str(tiny["red"]), "dtype": "auto", "weight": 3.0},
    ]
    assert written["num_hidden_layers"] == 4  # two members of two layers: each has its own cache


def test_the_chat_template_of_the_config_travels_along(tiny, tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}!{% endfor %}"
    own = {"path": str(tiny["llama"]), "chat_template": template}
    export(parsed(tiny, own=own, mix={**MIX, "members": ["own", "red"]}), "mix", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_a_copy_stands_alone_and_can_be_moved(tiny, tmp_path):
    shutil.copytree(tiny["llama"], tmp_path / "source")
    models = {"base": {"path": "source"}, "red": {"base": "base", "adapter": str(tiny["red"])}}
    config = parse_config(
        {"models": {**models, "mix": {**MIX, "members": ["base", "red"]}}}, source=tmp_path / "c.yaml"
    )
    export(config, "mix", tmp_path / "out", copy=True)
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "out").rename(tmp_path / "moved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", trust_remote_code=True)
    assert len(model.backbones) == 1


@pytest.mark.parametrize(
    ("models", "name", "message"),
    [
        ({"mix": MIX}, "mxi", "did you mean 'mix'"),
        ({}, "llama", "is no probability_average"),
        ({"crowd": {"method": "crowd_vote", "members": ["llama", "red"]}}, "crowd", "is no probability_average"),
        (
            {"shy": {"base": "llama", "system_prompt": "Be shy."}, "mix": {**MIX, "members": ["llama", "shy"]}},
            "mix",
            "shy",
        ),
    ],
)
def test_what_is_no_one_model_is_refused_by_name(models, name, message, tiny, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export(parsed(tiny, **models), name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_different_vocabularies_are_refused(tiny, tmp_path):
    other = make_model(tmp_path / "other", extra=("<|extra|>",))
    config = parsed(tiny, other={"path": str(other)}, mix={**MIX, "members": ["llama", "other"]})
    with pytest.raises(ModelLoadError, match="different vocabularies"):
        export(config, "mix", tmp_path / "out")


def test_a_folder_in_use_is_left_alone(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(parsed(tiny, mix=MIX), "mix", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
