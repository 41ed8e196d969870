"""Quantised members: what vLLM says of the checkpoint alone is what the member says in an ensemble."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from ensemble_server.ensembles.errors import ModelLoadError
from tests.conftest import WIDE, make_adapter, make_model
from tests.reference import plain_model, pooled
from tests.server.one_model.vllm.engines import (
    TEXTS,
    VOCAB_SIZE,
    Judge,
    engine,
    exported,
    logprobs_of,
    run,
)
from tests.server.one_model.vllm.quantised import ModelsReference, dequantised, make_quantised

pytestmark = pytest.mark.vllm

EQUAL_NATS = 1e-5
# Another order of summation can take a number that lies between two steps of an int8 to the other one: 0.014 nats were
# seen, once in 18 texts.
ROUNDING_NATS = 0.05
KEPT = "model.layers.1.mlp.down_proj"  # in float32, as its checkpoint says by name
WEIGHTS = {"tight": 1, "eight": 2}
LONG = [text for text in TEXTS if len(text) > 3]
WHOLE = {"prompt_logprobs": -1, "max_tokens": 1, "logprobs": None}


@pytest.fixture(scope="module")
def family(members, tmp_path_factory):
    """`tight` in float32; `eight` in int8, of which `source` are the weights before they were rounded; adapters."""
    root = tmp_path_factory.mktemp("quantised")
    source = make_model(root / "source", seed=5, vocab_size=VOCAB_SIZE, **WIDE)
    return {
        "tight": members["tight"],
        "source": source,
        "eight": make_quantised(root / "eight", source, kept=[KEPT]),
        "red": make_adapter(root / "red", source, seed=3),
        "narrow": make_adapter(root / "narrow", source, seed=4, rank=2, target_modules=["v_proj", "down_proj"]),
    }


def distributions(outputs) -> list[np.ndarray]:
    """(T - 1, V) per output: after each prompt token but the last."""
    return [
        np.array([[found[token].logprob for token in range(VOCAB_SIZE)] for found in output.prompt_logprobs[1:]])
        for output in outputs
    ]


def test_a_quantised_member_says_what_it_says_alone_and_mixes_with_one_that_is_not(family, tmp_path):
    alone = {}
    for name in WEIGHTS:
        with engine(family[name], max_logprobs=-1) as llm:
            alone[name] = distributions(run(llm, LONG, **WHOLE))
    folder = exported({name: family[name] for name in WEIGHTS}, tmp_path / "out", members=WEIGHTS, pool="posterior")
    with engine(folder, max_logprobs=-1) as llm:
        layers = llm.apply_model(lambda model: model.backbone_b.model.model.layers[1].mlp)
        one_hot = run(llm, LONG, **WHOLE, extra_args={"ensemble_weights": [0, 1]})
        mixed = {
            pool: run(llm, LONG, **WHOLE, extra_args={"ensemble_pool": pool}) for pool in ("posterior", "geometric")
        }
    assert [type(layer.quant_method).__name__ for mlp in layers for layer in (mlp.gate_up_proj, mlp.down_proj)] == [
        "CompressedTensorsLinearMethod",
        "UnquantizedLinearMethod",
    ]
    for found, expected in zip(distributions(one_hot), alone["eight"], strict=True):
        np.testing.assert_allclose(found, expected, atol=EQUAL_NATS)
    for pool, outputs in mixed.items():
        for found, output, *said in zip(distributions(outputs), outputs, *alone.values(), strict=True):
            expected, _ = pooled(pool, np.stack(said), list(WEIGHTS.values()), output.prompt_token_ids[:-1])
            np.testing.assert_allclose(found, expected, atol=EQUAL_NATS)


def test_adapters_on_a_quantised_base_are_exact(family, tmp_path):
    """Changes are added to what the int8 layers give, from inputs that were not rounded."""
    members = {"llama": family["eight"], **{name: family[name] for name in ("red", "narrow", "tight")}}
    weights = {"llama": 1, "red": 2, "narrow": 1, "tight": 1}
    models = {
        "llama": dequantised(family["eight"], family["source"]),
        "red": dequantised(family["eight"], family["source"], family["red"]),
        "narrow": dequantised(family["eight"], family["source"], family["narrow"]),
        "tight": plain_model(family["tight"]),
    }
    judge = Judge(members, ModelsReference(models, VOCAB_SIZE))
    unrounded = Judge(members | {"llama": family["source"]})
    with engine(exported(members, tmp_path / "out", members=weights)) as llm:
        differences = [judge(output, weights, tolerance=ROUNDING_NATS) for output in run(llm)]
        for index, name in enumerate(weights):
            one_hot = [float(index == other) for other in range(len(weights))]
            outputs = run(llm, TEXTS[:3], extra_args={"ensemble_weights": one_hot})
            differences += [judge(output, {name: 1}, tolerance=ROUNDING_NATS) for output in outputs]
            if name != "tight":
                assert max(unrounded(output, {name: 1}, tolerance=1) for output in outputs) > ROUNDING_NATS
    assert np.median(differences) < EQUAL_NATS
    assert max(differences) < ROUNDING_NATS


def test_weights_that_vllm_quantises_while_it_reads_them_are_so_for_every_member(family, tmp_path):
    """`--quantization` means all members, also those of a shared base."""
    settings = {"quantization": "fp8_per_channel", "dtype": "bfloat16"}
    alone = {}
    for name in ("tight", "source"):
        with engine(family[name], **settings) as llm:
            alone[name] = run(llm)
    members = {"tight": family["tight"], "llama": family["source"], "red": family["red"]}
    with engine(exported(members, tmp_path / "out", members=list(members)), **settings) as llm:
        for name, one_hot in (("tight", [1, 0, 0]), ("source", [0, 1, 0])):
            for output, expected in zip(run(llm, extra_args={"ensemble_weights": one_hot}), alone[name], strict=True):
                assert output.outputs[0].token_ids == expected.outputs[0].token_ids
                assert abs(logprobs_of(output) - logprobs_of(expected)).max() < EQUAL_NATS
        one_hot = {"ensemble_weights": [0, 0, 1]}
        changed = [output.outputs[0].token_ids for output in run(llm, extra_args=one_hot)]
    assert changed != [output.outputs[0].token_ids for output in alone["source"]]


def test_what_cannot_be_quantised_as_asked_is_refused_by_name(family, tmp_path):
    members = {name: family[name] for name in WEIGHTS}
    folder = exported(members, tmp_path / "out", members=WEIGHTS)
    with (
        pytest.raises(ModelLoadError, match=r"cannot build member 'eight'.*compressed-tensors.*does not match"),
        engine(folder, quantization="fp8_per_channel", dtype="bfloat16"),
    ):
        pass
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    members["eight"] = make_quantised(tmp_path / "cached", family["source"], kv_cache_scheme=scheme)
    folder = exported(members, tmp_path / "cached out", members=WEIGHTS)
    with pytest.raises(ModelLoadError, match=r"member 'eight'.*asks for a quantised KV cache"), engine(folder):
        pass


def test_in_transformers_a_quantised_member_is_what_transformers_makes_of_it(family, tmp_path):
    """It rounds inputs in another way than vLLM, so the two are not held to each other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    members = {"llama": family["eight"], "red": family["red"], "tight": family["tight"]}
    directory = exported(members, tmp_path / "out", members=dict.fromkeys(members, 1))
    ensemble = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    alone = {
        "llama": AutoModelForCausalLM.from_pretrained(family["eight"]),
        "red": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family["eight"]), family["red"]),
        "tight": plain_model(family["tight"]),
    }
    token_ids = torch.arange(5, 45)
    with torch.no_grad():
        found = ensemble(token_ids[None]).logits[0].numpy()
    expected, _ = ModelsReference(alone, VOCAB_SIZE)("arithmetic", dict.fromkeys(members, 1.0), token_ids.tolist())
    np.testing.assert_allclose(found, expected, atol=EQUAL_NATS)
