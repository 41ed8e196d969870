"""Whole distillations of tiny models: what is taught, what is kept, and what a killed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ensemble_server.ensembles.errors import ConfigError, UnknownModelError
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.gates import identity
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.distill import training
from ensemble_server.server.distill.card import CARD_FILE, Card
from ensemble_server.server.distill.run import distill
from tests.conftest import SAMPLE, make_model
from tests.gates import a_gate
from tests.server.distill.conftest import Quiet

pytestmark = pytest.mark.usefixtures("without_figures")

Wanted = Callable[..., Distillation]


class KilledError(Exception):
    pass


class Killing(Quiet):
    """Ends the run after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def losses(self, clm: float, kl: float | None) -> None:
        super().losses(clm, kl)
        if len(self.steps) > self._after:
            raise KilledError


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.slow
def test_the_student_comes_closer_to_its_teacher_on_text_that_was_held_out(config, wanted: Wanted, tmp_path) -> None:
    listener = Quiet()
    card = distill(config, wanted(clm=0, epochs=20, learning_rate=0.01), tmp_path / "all", listener)
    assert card.before.kl is not None and card.after.kl is not None
    assert card.after.kl < 0.85 * card.before.kl
    assert listener.steps[-1][1] is not None
    assert len(listener.steps) == card.steps
    assert Card.load(tmp_path / "all") == card
    assert not list(tmp_path.glob(".all*"))
    for name in ("README.md", "losses.csv", "adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "all" / name).stat().st_size
    assert "llama" in (tmp_path / "all" / "README.md").read_text()
    table = (tmp_path / "all" / "losses.csv").read_text().splitlines()
    assert table[0] == "step,clm_nats,kl_nats"
    assert len(table) == card.steps + 1


async def test_the_student_is_served_as_a_model_of_the_config(config_file, config, wanted, tmp_path) -> None:
    import asyncio

    from ensemble_server.ensembles.base import GenerationRequest, Sampling, collect
    from ensemble_server.server.config.loading import load_config
    from ensemble_server.server.hosting import Hosting

    await asyncio.to_thread(distill, config, wanted(steps=1), tmp_path / "all", Quiet())
    text = config_file.read_text() + f"  all: {{base: llama, adapter: {tmp_path / 'all'}}}\n"
    config_file.write_text(text)
    async with Hosting.open(load_config(config_file)) as hosting:
        answer = await collect(
            hosting.models["all"], GenerationRequest(prompt="To be", sampling=Sampling(max_tokens=3, temperature=0))
        )
        assert answer.choices[0].text


@pytest.mark.slow
def test_every_target_is_taught_from_what_was_read_once(config, wanted, tmp_path) -> None:
    first = Quiet()
    distill(config, wanted(steps=2), tmp_path / "mixture", first)
    assert any("reads" in stage for stage in first.stages)
    seen = {(tmp_path / "mixture" / "losses.csv").read_text()}
    for name, settings in {
        "min_ce": {"target": "min_ce", "level": "token"},
        "avg_ce": {"target": "avg_ce", "level": "document"},
        "cut": {"tail": False},
        "other-pool": {"ensemble": "mix"},
    }.items():
        listener = Quiet()
        distill(config, wanted(steps=2, **settings), tmp_path / name, listener)
        assert not any("reads" in stage for stage in listener.stages), name
        seen.add((tmp_path / name / "losses.csv").read_text())
    assert len(seen) == 5


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["product", "contrast"])
def test_a_geometric_pool_teaches_too(config, wanted, tmp_path, ensemble: str) -> None:
    card = distill(config, wanted(ensemble=ensemble, clm=0, epochs=10, learning_rate=0.01), tmp_path / "all", Quiet())
    assert card.after.kl is not None and card.before.kl is not None
    assert card.after.kl < card.before.kl


def test_a_control_learns_from_the_text_alone_and_is_measured_alike(config, wanted, tmp_path) -> None:
    card = distill(config, wanted(clm=1, epochs=5), tmp_path / "control", Quiet())
    taught = distill(config, wanted(epochs=5), tmp_path / "all", Quiet())
    assert card.before == taught.before
    assert card.ensemble_bits_per_byte == taught.ensemble_bits_per_byte
    assert card.steps == taught.steps
    assert (tmp_path / "control" / "losses.csv").read_text().splitlines()[1].endswith(",")


def test_all_weights_can_be_taught(config, wanted, tmp_path) -> None:
    card = distill(config, wanted(full=True, clm=0, epochs=10, learning_rate=0.001), tmp_path / "all", Quiet())
    assert card.after.kl is not None and card.before.kl is not None
    assert card.after.kl < card.before.kl
    assert (tmp_path / "all" / "config.json").is_file()
    assert (tmp_path / "all" / "tokenizer.json").is_file()


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(config, wanted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(training, "MOST_TIME_FOR_CHECKPOINTS", 1e9)
    straight, broken = wanted(steps=6), wanted(steps=6)
    distill(config, straight, tmp_path / "straight", Quiet())
    with pytest.raises(KilledError):
        distill(config, broken, tmp_path / "broken", Killing(after=3))
    assert not (tmp_path / "broken").exists()
    rest = Quiet()
    card = distill(config, broken, tmp_path / "broken", rest)
    assert len(rest.steps) == 3
    assert card.steps == 6
    one, other = weights_in(tmp_path / "straight"), weights_in(tmp_path / "broken")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert (tmp_path / "straight" / "losses.csv").read_bytes() == (tmp_path / "broken" / "losses.csv").read_bytes()


def test_a_reading_that_was_killed_goes_on_with_the_missing_windows(config, wanted, tmp_path, monkeypatch) -> None:
    from ensemble_server.server.distill import records, teacher

    for module in (records, teacher):
        monkeypatch.setattr(module, "WINDOWS_PER_SHARD", 2)

    class Impatient(Quiet):
        def progress(self, done: int, total: int) -> None:
            if "trained on" in self.stages[-1] and done == 5:
                raise KilledError

    with pytest.raises(KilledError):
        distill(config, wanted(steps=1), tmp_path / "all", Impatient())
    kept = [file for file in (tmp_path / "cache" / "teachers").rglob("*.safetensors") if "windows" in file.name]
    before = {file: file.stat().st_mtime_ns for file in kept}
    assert len(before) >= 2
    distill(config, wanted(steps=1), tmp_path / "all", Quiet())
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_damaged_records_are_read_again(config, wanted, tmp_path) -> None:
    distill(config, wanted(steps=1), tmp_path / "one", Quiet())
    for file in (tmp_path / "cache" / "teachers").rglob("windows-*"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    listener = Quiet()
    distill(config, wanted(steps=1, seed=1), tmp_path / "two", listener)
    assert any("reads" in stage for stage in listener.stages)


def test_what_is_there_already_stays(config, wanted, tmp_path) -> None:
    card = distill(config, wanted(steps=1), tmp_path / "all", Quiet())
    listener = Quiet()
    assert distill(config, wanted(steps=1, minutes=3), tmp_path / "all", listener) == card
    assert listener.stages == []


def test_another_run_does_not_take_the_place_of_what_is_there(config, wanted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(training, "MOST_TIME_FOR_CHECKPOINTS", 1e9)
    distill(config, wanted(steps=1), tmp_path / "all", Quiet())
    with pytest.raises(ConfigError, match="holds something else"):
        distill(config, wanted(steps=2), tmp_path / "all", Quiet())
    with pytest.raises(KilledError):
        distill(config, wanted(steps=2), tmp_path / "more", Killing(after=1))
    with pytest.raises(ConfigError, match="begun with another target"):
        distill(config, wanted(steps=2, target="avg_ce"), tmp_path / "more", Quiet())


def test_a_loss_that_is_no_number_ends_the_run(config, wanted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "loss_of", lambda *losses: torch.tensor(float("nan")))
    with pytest.raises(ConfigError, match="the loss is nan: the student is lost"):
        distill(config, wanted(steps=2), tmp_path / "all", Quiet())


def test_time_decides_how_many_steps_there_are(config, wanted, tmp_path) -> None:
    card = distill(config, wanted(epochs=1000, minutes=0.01), tmp_path / "all", Quiet())
    assert 0 < card.steps < 1000


def test_documents_of_their_own_are_taught_and_held_out_whole(config, wanted, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{number}. {SAMPLE[number:90]}"}) + "\n" for number in range(10)))
    card = distill(
        config, wanted(text=[str(file)], steps=2, target="min_ce", level="document"), tmp_path / "all", Quiet()
    )
    assert card.num_held_out_tokens < card.num_train_tokens / 2
    assert list(card.files) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ensemble": "vote"}, "only a probability_average can teach"),
        ({"ensemble": "llama"}, "only a probability_average can teach"),
        ({"window": 1000}, "do not fit into the context"),
    ],
)
def test_what_cannot_be_taught_is_refused_by_name(config, wanted, tmp_path, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(config, wanted(**settings), tmp_path / "all", Quiet())
    assert not (tmp_path / "all").exists()


def test_an_average_with_a_gate_is_refused(config_file, config, wanted, tmp_path) -> None:
    models = yaml.safe_load(config_file.read_text())["models"]
    members = models["adaptive"]["members"]
    named = {name: identity(config.models, name, config_file.parent) for name in members}
    gate = a_gate(dict.fromkeys(members, 1), 0.01, identities=named).model_dump(mode="json")
    config_file.write_text(yaml.safe_dump({"models": models | {"gated": models["adaptive"] | {"gate": gate}}}))
    with pytest.raises(ConfigError, match="'gated' has `gate`"):
        distill(load_config(config_file), wanted(ensemble="gated"), tmp_path / "all", Quiet())
    assert not (tmp_path / "all").exists()


def test_a_student_without_the_members_tokens_is_refused(config_file, wanted, tmp_path) -> None:
    models = yaml.safe_load(config_file.read_text())["models"]
    more = make_model(tmp_path / "more", extra=("<tool>",), vocab_size=336)
    others = {"more": {"path": str(more)}, "both": {"method": "probability_average", "members": ["llama", "more"]}}
    config_file.write_text(yaml.safe_dump({"models": models | others}))
    config = load_config(config_file)
    with pytest.raises(ConfigError, match="'llama' lacks 1 tokens that members of 'both' have"):
        distill(config, wanted(ensemble="both"), tmp_path / "all", Quiet())
    assert distill(config, wanted(ensemble="both", student="more", steps=1), tmp_path / "all", Quiet()).steps == 1


def test_an_unknown_ensemble_is_named(config, wanted, tmp_path) -> None:
    with pytest.raises(UnknownModelError, match="did you mean 'adaptive'"):
        distill(config, wanted(ensemble="adaptiv"), tmp_path / "all", Quiet())


def test_text_that_will_be_measured_on_is_refused(config, wanted, config_file, tmp_path) -> None:
    words = " ".join(f"word{number}" for number in range(300))
    (tmp_path / "long.txt").write_text(f"{words}\n{words[:400]}\nthe end\n")
    (tmp_path / "test.txt").write_text(words[500:])
    with pytest.raises(ConfigError, match=r"100% of .*test.txt stand in what would be trained on"):
        distill(
            config,
            wanted(text=[str(tmp_path / "long.txt")]),
            tmp_path / "all",
            Quiet(),
            tests=[tmp_path / "test.txt"],
        )


def test_a_text_that_will_be_measured_on_is_read_once(config, wanted, config_file, tmp_path, monkeypatch) -> None:
    from ensemble_server.server.distill import texts

    found: list[Path] = []
    read = texts.read_documents
    monkeypatch.setattr(texts, "read_documents", lambda path: found.append(path) or read(path))
    (tmp_path / "test.txt").write_text("another text\n" * 9)
    distill(config, wanted(steps=1), tmp_path / "all", Quiet(), tests=[tmp_path / "test.txt"])
    assert found.count(tmp_path / "test.txt") == 1


def test_a_text_that_leaves_nothing_to_hold_out_is_refused(config, wanted, tmp_path) -> None:
    (tmp_path / "line.txt").write_text("one line only")
    with pytest.raises(ConfigError, match="nothing to hold out"):
        distill(config, wanted(text=[str(tmp_path / "line.txt")]), tmp_path / "all", Quiet())


def test_records_that_would_be_too_large_are_refused_before_anything_is_read(config, wanted, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--records-mb allows 0"):
        distill(config, wanted(), tmp_path / "all", Quiet(), records_bytes=1000)


def test_a_card_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="is no student"):
        Card.load(tmp_path)


def test_what_ends_before_there_is_a_checkpoint_leaves_nothing(config, wanted, tmp_path) -> None:
    with pytest.raises(KilledError):
        distill(config, wanted(steps=2), tmp_path / "all", Killing(after=0))
    assert not list(tmp_path.glob(".all*"))
