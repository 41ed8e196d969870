"""Every YAML that a page shows is a config, entries of one, or a comparison's plan, and is read as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.registry import METHODS
from ensemble_server.server.compare.planning.plan import load_plan
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.config.strict_yaml import read_yaml
from tests.docs.snippets import PAGES, ROOT, Snippet, snippets

CONFIG_BLOCKS = {"models", "server", "engine", "embedding", "batch"}

# What pages call their models, for entries that are shown without those that they name.
STOCK: dict[str, dict[str, Any]] = {
    "base": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "code": {"base": "base", "adapter": "experts/code"},
    "jargon": {"base": "base", "adapter": "experts/jargon"},
    "shakespeare": {"base": "base", "adapter": "experts/shakespeare"},
    "remote": {"url": "http://127.0.0.1:9000/v1", "model": "some-name"},
    "mix": {"method": "probability_average", "members": ["base", "code"]},
}

# Files that pages name beside a config.
FILES = {
    "my-moe.yml": """
base_model: base
gate_mode: hidden
experts:
  - {source_model: org/expert-7b, positive_prompts: [python]}
  - {source_model: base, positive_prompts: [chat]}
""",
}

SNIPPETS = [snippet for page in PAGES for snippet in snippets(page) if snippet.kind == "yaml"]


def as_config(value: dict[str, Any]) -> dict[str, Any]:
    """The whole config of which `value` is shown: itself, with models where it has only other blocks, or as models."""
    if "models" in value:
        return value
    if value.keys() <= CONFIG_BLOCKS:
        return {"models": STOCK, **value}
    return {"models": STOCK | value}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_yaml_of_a_page_is_read(snippet: Snippet, tmp_path: Path) -> None:
    if snippet.mark is not None:
        assert snippet.mark[0] in ("a part", "run by"), f"{snippet}: YAML can always be read"
        return
    file = tmp_path / "shown.yaml"
    file.write_text(snippet.text, encoding="utf-8")
    value, problems = read_yaml(file)
    assert problems == []
    if "baseline" in value:
        load_plan(_beside_the_configs(snippet.text, tmp_path))
        return
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    parse_config(as_config(value), source=file)


def test_every_method_is_shown_on_a_page() -> None:
    shown = "\n".join(snippet.text for snippet in SNIPPETS)
    assert [name for name in METHODS if f"method: {name}" not in shown] == []


def _beside_the_configs(plan: str, folder: Path) -> Path:
    """The plan in a folder like `configs/`, with the rows of tasks that pages call test.jsonl and dev.jsonl."""
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "configs").mkdir()
    for name in ("demo.yaml", "merges"):
        (folder / "configs" / name).symlink_to(ROOT / "configs" / name)
    for name in ("test.jsonl", "dev.jsonl"):
        (folder / "configs" / name).symlink_to(ROOT / "data" / "tasks" / "gsm8k_test_200.jsonl")
    file = folder / "configs" / "plan.yaml"
    file.write_text(plan, encoding="utf-8")
    return file
