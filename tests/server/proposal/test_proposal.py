from __future__ import annotations

import json
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.proposal.machine import Machine
from ensemble_server.server.proposal.proposal import Proposal, propose
from ensemble_server.server.proposal.sources import entries_of
from ensemble_server.server.proposal.written import as_yaml
from ensemble_server.server.rehearsal import rehearse
from tests.conftest import make_adapter, make_model

MACHINE = Machine("cpu", 8 * 10**9, prefers_float32=True)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; tuned, which has added a pad token; expert, an adapter of base; other, with tokens in another order."""
    root = tmp_path_factory.mktemp("shelf")
    make_model(root / "base")
    make_model(root / "tuned", seed=1, vocab_size=321, extra=("<pad>",))
    make_adapter(root / "expert", root / "base", seed=2)
    file = make_model(root / "other", seed=3) / "tokenizer.json"
    content = json.loads(file.read_bytes())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return root


def proposed(shelf: Path, *arguments: str, machine: Machine = MACHINE) -> Proposal:
    return propose(entries_of(arguments, folder=shelf), source=shelf / "ensemble.yaml", machine=machine)


def test_the_file_says_what_was_proposed_and_can_be_served(shelf: Path) -> None:
    proposal = proposed(shelf, "base", "tuned", "expert")
    file = shelf / "ensemble.yaml"
    file.write_text(as_yaml(proposal), encoding="utf-8")
    config = load_config(file)
    made = proposal.as_config(file)
    assert config.models == made.models and config.engine == made.engine
    assert not rehearse(config).problems
    assert list(config.models)[:3] == ["base", "tuned", "expert"]
    assert config.main_model == "mix"
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 120


def test_members_with_added_tokens_are_averaged_and_it_is_said_who_lacks_them(shelf: Path) -> None:
    proposal = proposed(shelf, "base", "tuned")
    assert proposal.ensembles[0].keys["members"] == ["base", "tuned"]
    assert any("one vocabulary but for <pad>, which base lack" in note for note in proposal.notes)


def test_every_member_that_is_hosted_has_its_facts_above_it(shelf: Path) -> None:
    (base,) = proposed(shelf, "base").members
    for fact in ("llama", "37.0 k parameters", "context 512", "chat template", "answers end with <|im_end|>"):
        assert fact in base.comment


def test_one_model_gets_prompts_and_samples(shelf: Path) -> None:
    ensembles = {entry.name: entry.keys for entry in proposed(shelf, "base").ensembles}
    assert ensembles["mix"]["members"] == ["base", "careful"]
    assert ensembles["majority"]["samples"] == 5
    assert "crowd" not in ensembles


def test_different_vocabularies_are_named_and_whatever_is_proposed_loads(shelf: Path) -> None:
    proposal = proposed(shelf, "base", "tuned", "other")
    assert any("different vocabularies: base, tuned | other" in note for note in proposal.notes)
    assert "crowd" in {entry.name for entry in proposal.ensembles}
    assert not rehearse(proposal.as_config(shelf / "ensemble.yaml")).problems


def test_names_of_members_are_never_taken_by_ensembles(shelf: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "mix")
    make_model(tmp_path / "crowd")
    entries = entries_of(["mix", "crowd"], folder=tmp_path)
    proposal = propose(entries, source=tmp_path / "e.yaml", machine=MACHINE)
    assert {entry.name for entry in proposal.ensembles} >= {"mix-ensemble", "crowd-ensemble"}


def test_dtype_batch_and_context_follow_the_machine(shelf: Path) -> None:
    roomy = proposed(shelf, "base")
    assert roomy.members[0].keys["dtype"] == "float32" and roomy.engine == {"max_batch": 32, "max_context": 512}
    tight = proposed(shelf, "base", machine=Machine("cpu", 3 * 10**6, prefers_float32=False))
    assert "dtype" not in tight.members[0].keys and tight.engine["max_batch"] < 32
    assert "fewer sequences at once" in tight.engine_comment
    none = proposed(shelf, "base", machine=Machine("cpu", 1000, prefers_float32=False))
    assert none.engine_comment.startswith("these models do not fit")


def test_what_cannot_be_loaded_is_named(shelf: Path, tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"model 'broken': .*no tokenizer that loads"):
        proposed(shelf, str(broken), "base")


def test_models_that_may_be_fine_tunes_of_one_base_are_told_of_deltas(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "math", "law")):
        make_model(tmp_path / name, seed=seed)
    make_model(tmp_path / "deep", num_hidden_layers=3)
    entries = entries_of(["./base", "./math", "./law", "./deep"], folder=tmp_path)
    proposal = propose(entries, source=tmp_path / "ensemble.yaml", machine=MACHINE)
    assert any(note.startswith("base, math, law: one architecture") for note in proposal.notes)
    assert any("`ensemble compress`" in note for note in proposal.notes)
