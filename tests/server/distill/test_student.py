"""Where a student starts, held to the models that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ConfigError, UnknownModelError
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.distill.student import Student, load_student, origin_of

MIX = Mixture({"llama": 1.0, "red": 2.0, "green": 1.0})
IDS = torch.arange(3, 40)[None]


def started(config: Config, wanted: Distillation, mixture: Mixture = MIX) -> Student:
    origin = origin_of(config, wanted, mixture)
    return load_student(origin, rank=wanted.rank, is_full=wanted.full, seed=wanted.seed)


@torch.inference_mode()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def merged(tiny: dict[str, Path], weights: dict[str, float]) -> torch.Tensor:
    """The linear merge by state dicts: base + Σ w (expert - base)."""
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    total = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    for name, share in weights.items():
        expert = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["llama"]), tiny[name])
        for key, weight in expert.merge_and_unload().named_parameters():
            total[key] += share * (weight.detach() - dict(base.named_parameters())[key].detach())
    base.load_state_dict(total, strict=False)
    return logits_of(base)


@pytest.mark.parametrize("full", [False, True])
def test_a_student_from_zero_says_what_its_weights_say(tiny, config, wanted, full: bool) -> None:
    base = logits_of(AutoModelForCausalLM.from_pretrained(tiny["llama"]))
    student = started(config, wanted(full=full, **({} if full else {"rank": 3})))
    assert torch.allclose(logits_of(student.model), base, atol=1e-5)


def test_an_adapter_student_trains_its_adapter_alone(config, wanted) -> None:
    names = started(config, wanted(rank=3)).trained
    assert names
    assert all("lora_" in name and "default" in name for name in names)
    assert len(started(config, wanted(full=True)).trained) > len(names) / 2


@pytest.mark.parametrize("full", [False, True])
def test_adapters_side_by_side_are_the_linear_merge(tiny, config, wanted, full: bool) -> None:
    """Ranks 3 and 4, so they take 7 of 9; the base itself is left out of the merge, whose weights are 2/3 and 1/3."""
    student = started(config, wanted(init="merge", full=full, **({} if full else {"rank": 9})))
    expected = merged(tiny, {"red": 2 / 3, "green": 1 / 3})
    assert torch.allclose(logits_of(student.model), expected, atol=1e-3)


def test_a_student_may_start_as_a_member(tiny, config, wanted) -> None:
    student = started(config, wanted(init="red"))
    assert torch.allclose(logits_of(student.model), merged(tiny, {"red": 1.0}), atol=1e-3)
    again = started(config, wanted(student="red"))
    assert torch.allclose(logits_of(again.model), logits_of(student.model))


def test_a_saved_adapter_loads_as_what_it_was(tiny, config, wanted, tmp_path: Path) -> None:
    student = started(config, wanted(init="merge", rank=8))
    student.save(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["llama"]), tmp_path / "saved")
    assert torch.allclose(logits_of(loaded), logits_of(student.model), atol=0.05)  # float16
    assert (
        sorted(file.name for file in (tmp_path / "saved").iterdir())
        == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        or (tmp_path / "saved" / "adapter_config.json").is_file()
    )


def test_a_saved_model_has_its_tokenizer(config, wanted, tmp_path: Path) -> None:
    student = started(config, wanted(full=True))
    before = logits_of(student.model)
    student.save(tmp_path / "saved")
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), before, atol=1e-5)
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("settings", "mixture", "message"),
    [
        ({"init": "merge", "rank": 6}, MIX, r"has rank 7 \(red \+ green\), `rank` is 6; give at least 7"),
        ({"init": "merge"}, Mixture({"llama": 1.0}), "nothing to merge"),
        ({"init": "merge"}, Mixture({"llama": 1.0, "red": -0.5}, "geometric"), "negative weight"),
        ({"init": "deep"}, MIX, "'deep' is no adapter of 'llama'"),
        ({"init": "vote"}, MIX, "no weights of its own"),
        ({"student": "mix"}, MIX, "no weights of its own"),
    ],
)
def test_a_start_that_cannot_be_is_refused(
    config: Config, wanted: Callable[..., Distillation], settings: dict, mixture: Mixture, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        origin_of(config, wanted(**settings), mixture)


def test_an_unknown_student_is_named_with_the_nearest_one(config, wanted) -> None:
    with pytest.raises(UnknownModelError, match="did you mean 'green'"):
        origin_of(config, wanted(student="gren"), MIX)
