"""Keys of methods whose value may be the path of a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.loading import load_config

MODELS = """
models:
  base: {path: org/base}
  code: {base: base, system_prompt: code}
  routed: {method: routing, mergekit_moe: moe/experts.yml, sources: {org/coder: code}}
"""


def config_beside(folder: Path, moe: str) -> Path:
    (folder / "moe").mkdir()
    (folder / "moe" / "experts.yml").write_text(moe, encoding="utf-8")
    (folder / "c.yaml").write_text(MODELS, encoding="utf-8")
    return folder / "c.yaml"


def test_a_mergekit_moe_file_is_read_as_it_is(tmp_path: Path) -> None:
    moe = """
        base_model: org/base
        gate_mode: cheap_embed
        experts_per_token: 1
        experts:
          - source_model: org/coder
            positive_prompts: [python]
          - source_model: base
            positive_prompts: [chat]
        """
    routed = load_config(config_beside(tmp_path, moe)).models["routed"]
    assert routed.references() == {"base", "code"}
    assert routed.members["code"].positive_prompts == ("python",)


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        ("experts: [", r"models\.routed\.mergekit_moe: .*experts\.yml: .*not valid YAML"),
        ("experts: []\nexperts: []", r"models\.routed\.mergekit_moe: .*experts"),
        (
            "{experts_per_token: 1, experts: [{source_model: a, positive_prompts: [x]}]}",
            "refers to an unknown model 'a'",
        ),
        ("experts: 3", r"models\.routed: mergekit_moe\.experts"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_problem_at_its_key(tmp_path: Path, moe: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(config_beside(tmp_path, moe))


def test_a_missing_file_is_a_problem_at_its_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(MODELS, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"models\.routed\.mergekit_moe: .*cannot be read"):
        load_config(tmp_path / "c.yaml")
