"""The exported directory in transformers, against members run one by one and pooled in NumPy."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.one_model import EnsembleConfig
from ensemble_server.server.one_model.evidence import NUM_KEPT
from ensemble_server.server.one_model.export import export
from tests.reference import Reference

VOCAB_SIZE = 320
TOLERANCE_NATS = 1e-4
TEXTS = ("The quick brown fox jumps over", "To be, or", "def f(x): return x + 1")
MIXTURES = {
    "arithmetic": {"members": {"llama": 1, "red": 2, "deep": 1}, "pool": "arithmetic"},
    "geometric with a negative weight": {"members": {"llama": -0.5, "red": 1.5}, "pool": "geometric"},
    "posterior": {"members": ["llama", "deep", "gemma", "gpt2"], "pool": "posterior"},
    "posterior with a share": {"members": {"llama": 1, "red": 2, "green": 1}, "pool": "posterior", "share": 0.05},
    "posterior with a learnt share": {"members": {"llama": 1, "red": 2}, "pool": "posterior", "share": "auto"},
    "one member": {"members": {"red": 1, "llama": 0}, "pool": "posterior"},
}


def config_of(tiny: dict[str, Path], mixture: dict) -> dict:
    hosted = {name: {"path": str(tiny[name])} for name in ("llama", "deep", "gemma", "gpt2")}
    adapters = {name: {"base": "llama", "adapter": str(tiny[name])} for name in ("red", "green")}
    return {"models": {**hosted, **adapters, "mix": {"method": "probability_average", **mixture}}}


def exported(tiny: dict[str, Path], mixture: dict, folder: Path, *, copy: bool = False) -> Path:
    export(parse_config(config_of(tiny, mixture), source=tiny["llama"] / "c.yaml"), "mix", folder, copy=copy)
    return folder


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """`made(name)`: the folder of a mixture, and its model, loaded once for all tests."""

    @cache
    def make(name: str):
        folder = exported(tiny, MIXTURES[name], tmp_path_factory.mktemp("made") / "out")
        return folder, load(folder)

    return make


@pytest.fixture(scope="module")
def reference(tiny: dict[str, Path]) -> Reference:
    places = {name: (tiny[name], None) for name in ("llama", "deep", "gemma", "gpt2")}
    return Reference(places | {name: (tiny["llama"], tiny[name]) for name in ("red", "green")}, VOCAB_SIZE)


def weights_of(mixture: dict) -> dict[str, float]:
    members = mixture["members"]
    weights = members if isinstance(members, dict) else dict.fromkeys(members, 1.0)
    return {name: weight for name, weight in weights.items() if weight}


def token_ids(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder).encode(text)


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_are_the_references_log_probabilities(name, made, reference):
    mixture = MIXTURES[name]
    folder, model = made(name)
    ids = token_ids(folder, TEXTS[0])
    expected, _ = reference(mixture["pool"], weights_of(mixture), ids, mixture.get("share", 0.0))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    assert logits.shape == (len(ids), VOCAB_SIZE)
    assert np.abs(logits - expected).max() < TOLERANCE_NATS


@pytest.mark.parametrize("name", ["arithmetic", "posterior", "posterior with a share"])
def test_a_padded_batch_generates_what_each_text_does_alone(name, made):
    folder, model = made(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    settings = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 2}
    together = model.generate(**tokenizer(list(TEXTS), return_tensors="pt", padding=True), **settings)
    for row, text in zip(together, TEXTS, strict=True):
        alone = model.generate(torch.tensor([tokenizer.encode(text)]), **settings)[0]
        assert row[-10:].tolist() == alone[-10:].tolist()


@pytest.mark.parametrize("name", ["arithmetic", "posterior with a share", "posterior with a learnt share"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_the_cache_changes_nothing(name, settings, made):
    folder, model = made(name)
    ids = torch.tensor([token_ids(folder, TEXTS[0])])
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {"do_sample": False, **settings, "max_new_tokens": 12, "use_cache": use_cache}
        outputs.append(model.generate(ids, **settings, pad_token_id=2).tolist())
    assert outputs[0] == outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arithmetic", "posterior with a share"])
def test_assisted_generation_gives_the_greedy_text(name, made, tiny, tmp_path):
    """Drafts of a member are mostly rejected here, so the cache, evidence included, is cut back again and again."""
    folder, model = made(name)
    draft = exported(tiny, {"members": ["llama"]}, tmp_path / "draft")
    ids = torch.tensor([token_ids(folder, TEXTS[0])])
    settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    assisted = model.generate(ids, assistant_model=load(draft), **settings)
    assert assisted.tolist() == model.generate(ids, **settings).tolist()


def test_evidence_survives_a_text_longer_than_the_kept_positions(made, reference):
    mixture = MIXTURES["posterior with a share"]
    folder, model = made("posterior with a share")
    ids = token_ids(folder, TEXTS[0] * 8)
    assert len(ids) > NUM_KEPT + 20
    expected, _ = reference("posterior", weights_of(mixture), ids, mixture["share"])
    with torch.no_grad():
        first = model(torch.tensor([ids[:-20]]), use_cache=True)
        then = model(torch.tensor([ids[-20:]]), past_key_values=first.past_key_values, use_cache=True)
    assert np.abs(then.logits[0].numpy() - expected[-20:]).max() < TOLERANCE_NATS


def test_the_loss_is_that_of_the_mixture(made, reference):
    folder, model = made("arithmetic")
    ids = token_ids(folder, TEXTS[2])
    expected, _ = reference("arithmetic", weights_of(MIXTURES["arithmetic"]), ids)
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss == pytest.approx(-np.mean([expected[t, ids[t + 1]] for t in range(len(ids) - 1)]), abs=TOLERANCE_NATS)


def test_adapters_share_one_copy_of_their_base(tiny, tmp_path):
    folder = exported(tiny, {"members": ["llama", "red", "green"]}, tmp_path / "out")
    assert len(load(folder).backbones) == 1


def test_a_pipeline_runs_on_the_directory(made):
    folder, model = made("arithmetic")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [answer] = generator(TEXTS[0], max_new_tokens=5, do_sample=False)
    expected = model.generate(torch.tensor([tokenizer.encode(TEXTS[0])]), max_new_tokens=5, do_sample=False)
    assert answer["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_lm_evaluation_harness_scores_the_mixture(made, reference):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, _ = made("arithmetic")
    ids = token_ids(folder, TEXTS[0])
    expected, _ = reference("arithmetic", weights_of(MIXTURES["arithmetic"]), ids)
    harness = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=2)
    context, continuation = "The quick brown fox", " jumps over"
    num_context = len(token_ids(folder, context))
    [(logprob, _)] = harness.loglikelihood(
        [Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True
    )
    assert token_ids(folder, context) == ids[:num_context]
    scored = [expected[t - 1, ids[t]] for t in range(num_context, len(ids))]
    assert logprob == pytest.approx(sum(scored), abs=1e-3)


def test_a_static_cache_is_refused_by_name(made):
    _, model = made("arithmetic")
    with pytest.raises(ValueError, match="static"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, cache_implementation="static")


def test_importing_the_package_registers_the_type(made):
    folder, _ = made("arithmetic")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(config, EnsembleConfig)
    assert AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).config.pool == "arithmetic"


def test_a_member_that_transformers_cannot_load_is_named(tiny, tmp_path):
    folder = exported(tiny, MIXTURES["arithmetic"], tmp_path / "out", copy=True)
    weights = folder / "weights" / "deep" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        ModelLoadError, match=r"member 'deep': .* lacks 1 weights of LlamaForCausalLM, .*1\.mlp\.up_proj"
    ):
        load(folder)
    config = folder / "weights" / "deep" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llamb"}))
    with pytest.raises(ModelLoadError, match=r"member 'deep': .* cannot be loaded as a causal LM"):
        load(folder)
