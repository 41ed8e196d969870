"""Whole fine-tunes: what is told of them, written and read again, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError, StorageError
from ensemble_server.server.deltas.compress import Compressed, Plan, check_method, compressed, parse_budget
from ensemble_server.server.deltas.difference import Difference, difference
from ensemble_server.server.deltas.writing import write_delta
from ensemble_server.server.weights.delta_folder import METHODS, read_card
from ensemble_server.server.weights.deltas import read_delta
from tests.conftest import SAMPLE, make_model, make_tokenizer
from tests.server.deltas.conftest import Tune, make_finetune

MAX_TOKENS = 512


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sample.txt"
    file.write_text(SAMPLE)
    return file


def one(changed: Difference, method: str, budget: str | Fraction, **settings: Any) -> Compressed:
    plan = Plan(check_method(method, is_calibrated=False), Fraction(budget))
    [found] = compressed(changed, [plan], max_tokens=MAX_TOKENS, **settings)
    return found


def plainly(folder: Path, base: Path) -> Any:
    """A delta's weights added to those of its base: a transformers model."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(base)
    delta = read_delta(folder)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, matrix in delta.matrices.items():
            is_turned = isinstance(model.get_submodule(path), Conv1D)
            parameters[f"{path}.weight"].add_(matrix.dense().T if is_turned else matrix.dense())
        for name, kept in delta.kept.items():
            parameters[name].copy_(kept)
    return model


# --- what it gives ---


@pytest.mark.parametrize(
    ("method", "tolerance"), [("svd", 2e-5), ("delta-come", 1e-3), ("bitdelta", 0.05), ("dare", 2e-5)]
)
def test_with_room_for_everything_it_is_the_fine_tune(
    changed: Difference, text: Path, method: str, tolerance: float
) -> None:
    """Planes of signs end at 16, and do not reach the largest weights."""
    loss = one(changed, method, "3", text=text).loss
    assert loss is not None
    assert loss.kl_mean < tolerance < 0.1 * loss.base_kl_mean
    assert loss.bpb == pytest.approx(loss.finetune_bpb, abs=0.02)
    assert loss.same_argmax > (0.8 if method == "bitdelta" else 0.98)


@pytest.mark.parametrize("method", METHODS)
def test_it_stays_within_its_budget_and_loses_more_in_a_smaller_one(
    changed: Difference, text: Path, method: str
) -> None:
    losses = []
    for budget in ("1/2", "1/6"):
        found = one(changed, method, budget, text=text)
        assert found.matrices_bytes <= 2 * found.num_weights * Fraction(budget)
        assert found.loss is not None
        losses.append(found.loss.kl_mean)
    assert losses[0] < losses[1]


def test_kl_and_bits_per_byte_are_those_of_two_plain_models(
    changed: Difference, tuned: Path, tiny: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = one(changed, "bitdelta", "1/4", text=text)
    assert found.loss is not None
    write_delta(found, changed, tmp_path / "delta", base="base", finetune="tuned", chat_template=None)
    models = [AutoModelForCausalLM.from_pretrained(tuned), plainly(tmp_path / "delta", tiny["llama"])]
    ids = AutoTokenizer.from_pretrained(tuned)(SAMPLE, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        expected, got = (torch.log_softmax(model(ids).logits[0, :-1, :320], -1) for model in models)
    kl = (expected.exp() * (expected - got)).sum(-1)
    assert found.loss.num_tokens == ids.shape[1] - 1
    assert found.loss.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.loss.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    same = (expected.argmax(-1) == got.argmax(-1)).float().mean()
    assert found.loss.same_argmax == pytest.approx(float(same))
    tokens = AutoTokenizer.from_pretrained(tuned)
    num_bytes = len(SAMPLE.encode()) - len(tokens.decode(ids[0, :1]).encode())
    nats = -float(got.gather(1, ids[0, 1:, None]).sum())
    assert ids.shape[1] < 512, "or the bytes are not those of the whole text"
    assert found.loss.bpb == pytest.approx(nats / 0.693147 / num_bytes, rel=1e-4)


def test_a_text_to_calibrate_by_makes_it_better_on_such_text(changed: Difference, text: Path) -> None:
    for method in ("svd", "delta-come"):
        losses = [one(changed, method, "1/6", text=text, calibrate=by).loss for by in (None, text)]
        assert losses[0] is not None and losses[1] is not None
        assert losses[1].kl_mean < losses[0].kl_mean, method


def test_the_base_is_as_it_was_afterwards(changed: Difference, text: Path) -> None:
    before = {name: weight.clone() for name, weight in changed.base.named_parameters()}
    one(changed, "svd", "1/6", text=text)
    assert all(torch.equal(weight, before[name]) for name, weight in changed.base.named_parameters())


# --- files ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_what_is_written_is_read_again(
    tune: Tune, tiny: dict[str, Path], tmp_path: Path, method: str, base: str
) -> None:
    changed = difference(tune(base), tiny[base])
    found = one(changed, method, "1/3")
    folder = tmp_path / "deltas" / "math"
    write_delta(found, changed, folder, base="the-base", finetune="the-tuned", chat_template="a template")
    card, back = read_card(folder), read_delta(folder)
    assert (card.method, card.facts["base"], card.facts["finetune"]) == (method, "the-base", "the-tuned")
    assert back.matrices.keys() == found.matrices.keys()
    assert all(back.matrices[path].dense().equal(matrix.dense()) for path, matrix in found.matrices.items())
    assert back.kept.keys() == changed.kept.keys() != set()
    assert all(back.kept[name].equal(kept) for name, kept in changed.kept.items())
    assert (folder / "chat_template.jinja").read_text() == "a template"
    assert [path.name for path in folder.parent.iterdir()] == ["math"]


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_low_rank_without_the_rest_is_an_adapter_for_peft(
    tune: Tune, tiny: dict[str, Path], tmp_path: Path, base: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    changed = difference(tune(base), tiny[base], embeddings="base", vectors="base")
    assert not changed.kept
    write_delta(one(changed, "svd", "1/3"), changed, tmp_path / "a", base="b", finetune="t", chat_template=None)
    assert read_card(tmp_path / "a").is_adapter
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny[base]), tmp_path / "a")
        expected, got = (model.eval()(ids).logits for model in (plainly(tmp_path / "a", tiny[base]), peft))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_weights_that_fit_in_sixteen_bits_are_kept_in_them(tiny: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = make_finetune(tmp_path / "tuned", tiny["llama"])
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tuned).save_pretrained(tmp_path / "half")
    assert {kept.dtype for kept in difference(tuned, tiny["llama"]).kept.values()} == {torch.float32}
    assert {kept.dtype for kept in difference(tmp_path / "half", tiny["llama"]).kept.values()} == {torch.bfloat16}


KILLED = """
import os, signal, sys
from pathlib import Path
from fractions import Fraction
from safetensors import torch as stored
from ensemble_server.server.deltas import writing
from ensemble_server.server.deltas.compress import Plan, compressed
from ensemble_server.server.deltas.difference import difference

changed = difference(Path(sys.argv[1]), Path(sys.argv[2]))
[found] = compressed(changed, [Plan("bitdelta", Fraction(1, 4))], max_tokens=512)
save = stored.save_file
stored.save_file = lambda *args, **kwargs: (save(*args, **kwargs), os.kill(os.getpid(), signal.SIGKILL))
writing.write_delta(found, changed, Path(sys.argv[3]), base="b", finetune="t", chat_template=None)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_delta_and_the_next_one_cleans_up(
    changed: Difference, tuned: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "delta"
    arguments = [sys.executable, "-c", KILLED, str(tuned), str(tiny["llama"]), str(out)]
    ended = subprocess.run(arguments, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1  # hidden, and named after the process
    write_delta(one(changed, "bitdelta", "1/4"), changed, out, base="b", finetune="t", chat_template=None)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_what_cannot_be_written_leaves_nothing(changed: Difference, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_delta(
            one(changed, "svd", "1/4"), changed, tmp_path / "file" / "a", base="b", finetune="t", chat_template=None
        )


# --- what is refused ---


def test_methods_and_budgets_are_refused_by_name(changed: Difference, text: Path) -> None:
    with pytest.raises(ConfigError, match=r"no method 'zip'.*svd, delta-come, bitdelta, dare"):
        check_method("zip", is_calibrated=False)
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        check_method("dare", is_calibrated=True)
    for budget in ("much", "1/0", "0", "-1/16", "nan"):
        with pytest.raises(ConfigError, match="budget"):
            parse_budget(budget)
    assert parse_budget("1/16") == parse_budget("0.0625")
    for method in METHODS:
        with pytest.raises(ConfigError, match=f"nothing of {method} fits in a budget of 1/100000"):
            one(changed, method, Fraction(1, 100_000))


def test_models_that_are_no_fine_tunes_of_the_base_are_refused(
    tiny: dict[str, Path], tuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=r"no fine-tune of this base: .* has the shape"):
        difference(tiny["deep"], tiny["llama"])
    with pytest.raises(ModelLoadError, match="no delta to compress"):
        difference(tiny["llama"], tiny["llama"])
    with pytest.raises(ModelLoadError, match="no delta to compress"):
        difference(make_finetune(tmp_path / "norms", tiny["llama"], only="norm"), tiny["llama"])
    more = make_finetune(tmp_path / "more", tiny["llama"])
    make_tokenizer(more, extra=("<think>", "</think>"))
    with pytest.raises(ModelLoadError, match=r"2 tokens that its base lacks .'<think>' first"):
        difference(more, tiny["llama"])
    damaged = make_finetune(tmp_path / "damaged", tiny["llama"], scale=float("inf"), only="q_proj")
    with pytest.raises(ModelLoadError, match=r"q_proj.weight is not finite"):
        difference(damaged, tiny["llama"])


def test_another_tokenizer_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = make_model(tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_bytes())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(other).get_vocab()["a"] == vocabulary["a"]
    with pytest.raises(ModelLoadError, match="another tokenizer"):
        difference(other, tiny["llama"])


def test_damaged_folders_are_refused(changed: Difference, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    write_delta(one(changed, "dare", "1/4"), changed, folder, base="b", finetune="t", chat_template=None)
    (folder / "delta.safetensors").write_bytes((folder / "delta.safetensors").read_bytes()[:-9])
    with pytest.raises(ModelLoadError, match="no whole delta"):
        read_delta(folder)
    (folder / "kept.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"lacks kept.safetensors"):
        read_card(folder)
    facts = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(ModelLoadError, match="format 99"):
        read_card(folder)
    (folder / "delta.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_card(folder)
    with pytest.raises(ModelLoadError, match=r"holds no delta.json"):
        read_card(tmp_path)
