from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.transformers_engine.adapters import AdapterRows, StackedLora, stack_adapters
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from tests.conftest import make_adapter

VOCAB = 320
TEXT = [7, 50, 301, 12, 12, 99, 240, 3, 64]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def adapters_of(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Adapters of different ranks, reach and scaling. Names as configs have them, with dots and names of layers."""
    queries = {"llama": "q_proj", "gpt2": "c_attn"}
    made: dict[str, dict[str, Path]] = {}

    def adapters_of(base: str) -> dict[str, Path]:
        if base not in made:
            root, folder = tmp_path_factory.mktemp(base), tiny[base]
            query = queries[base]
            made[base] = {
                "code-v1.5": make_adapter(root / "a", folder, seed=1, rank=2),
                query: make_adapter(root / "b", folder, seed=2, rank=8, target_modules=[query]),
                "pattern": make_adapter(
                    root / "c", folder, seed=3, rank=3, rank_pattern={query: 5}, alpha_pattern={query: 1}
                ),
                "rslora": make_adapter(root / "d", folder, seed=4, rank=4, use_rslora=True),
            }
        return made[base]

    return adapters_of


def load(base: Path, adapters: Mapping[str, Path]) -> Backbone:
    return Backbone.load(base, dtype="float32", device="cpu", adapters=adapters, vocab_size=VOCAB)


def peft_logprobs(base: Path, adapters: Mapping[str, Path]) -> dict[str | None, torch.Tensor]:
    """What PEFT itself makes of each adapter alone, and of the bare base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logprobs(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([TEXT])).logits[0, :, :VOCAB], -1)

    expected: dict[str | None, torch.Tensor] = {None: logprobs(AutoModelForCausalLM.from_pretrained(base))}
    wrapped: PeftModel | None = None
    for slot, (name, folder) in enumerate(adapters.items()):
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, adapter_name="0")
        else:
            wrapped.load_adapter(folder, adapter_name=str(slot))
        wrapped.set_adapter(str(slot))
        expected[name] = logprobs(wrapped.eval())
    return expected


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_adapters_in_one_batch_equal_peft_one_by_one(
    tiny: dict[str, Path], adapters_of: Callable[[str], dict[str, Path]], base: str
) -> None:
    adapters = adapters_of(base)
    expected = peft_logprobs(tiny[base], adapters)
    owners = [None, *adapters, "pattern", None]
    backbone = load(tiny[base], adapters)
    spans = [Span(RowCache(), TEXT[: 4 + i], 4 + i, owner) for i, owner in enumerate(owners[:5])]
    spans += [Span(RowCache(), TEXT, len(TEXT), owner) for owner in owners[5:]]
    for span, owner, logprobs in zip(spans, owners, backbone.forward(spans), strict=True):
        torch.testing.assert_close(logprobs, expected[owner][: len(span.token_ids)], atol=1e-4, rtol=0)
    names = list(expected)
    for i, one in enumerate(names):  # or the test would not tell them apart
        assert all((expected[one] - expected[other]).abs().max() > 0.01 for other in names[i + 1 :])


def test_the_base_is_read_once_for_all_adapters(
    tiny: dict[str, Path], adapters_of: Callable[[str], dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(tiny["llama"], adapters_of("llama"))
    calls = []
    head = backbone.model.lm_head
    monkeypatch.setattr(head, "forward", lambda x, forward=head.forward: calls.append(x.shape) or forward(x))
    backbone.forward([Span(RowCache(), TEXT, 1, owner) for owner in (None, "pattern", "rslora")])
    assert calls == [(1, 3, 32)]


def test_adapters_are_not_computed_in_a_forward_where_no_row_has_one(
    tiny: dict[str, Path], adapters_of: Callable[[str], dict[str, Path]]
) -> None:
    backbone = load(tiny["llama"], adapters_of("llama"))
    expected = backbone.forward([Span(RowCache(), TEXT, 2), Span(RowCache(), TEXT, 2, "pattern")])[0]
    for layer in backbone.model.modules():
        if isinstance(layer, StackedLora):
            layer.a.fill_(torch.nan)  # which zeros of a mask would not hide
    (logprobs,) = backbone.forward([Span(RowCache(), TEXT, 2)])
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    assert backbone.forward([Span(RowCache(), TEXT, 2, "pattern")])[0].isnan().all()


def test_a_mask_keeps_each_tokens_own_columns() -> None:
    rows = AdapterRows(["red", "green"])
    rows.assign(["green", None, "red"], torch.float32, torch.device("cpu"))
    assert rows.mask((2, 1)).tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert rows.mask((0, 3)).tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert rows.mask((2, 1)) is rows.mask((2, 1))
    rows.assign(["red"], torch.float32, torch.device("cpu"))
    assert rows.mask((2, 1)).tolist() == [[1, 1, 0]]


# --- what is refused ---


def refusal(base: Path, folder: Path, *, beside: Path | None = None) -> str:
    from transformers import AutoModelForCausalLM

    adapters = {"beside": beside, "odd": folder} if beside else {"odd": folder}
    with pytest.raises(ModelLoadError) as caught:
        stack_adapters(AutoModelForCausalLM.from_pretrained(base), adapters)
    assert "adapter 'odd'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "trains biases"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which changes the base"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_more_than_plain_lora_is_refused_by_name(
    tiny: dict[str, Path], tmp_path: Path, changes: dict, feature: str
) -> None:
    folder = make_adapter(tmp_path / "odd", tiny["llama"], seed=0, **changes)
    assert feature in refusal(tiny["llama"], folder)
    assert feature in refusal(tiny["llama"], folder, beside=tiny["red"])


def test_other_kinds_of_adapters_are_refused_by_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny["llama"]), config).save_pretrained(tmp_path)
    assert "is of type IA3; only LoRA" in refusal(tiny["llama"], tmp_path)
    assert "is of type IA3; only LoRA" in refusal(tiny["llama"], tmp_path, beside=tiny["red"])


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_layers_of_the_blocks_can_carry_an_adapter(tiny: dict[str, Path], tmp_path: Path, layer: str) -> None:
    folder = make_adapter(tmp_path / "odd", tiny["llama"], seed=0, target_modules=["q_proj", layer])
    assert layer in refusal(tiny["llama"], folder)
    edited(folder, lambda weights: {key: value for key, value in weights.items() if "base_layer" not in key})
    assert layer in refusal(tiny["llama"], folder)


def edited(folder: Path, edit: Callable[[Weights], Weights]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)
    return folder


def with_nan(weights: Weights) -> Weights:
    key = next(key for key in weights if "v_proj.lora_B" in key)
    weights[key][0, 0] = torch.nan
    return weights


def with_embeddings(weights: Weights) -> Weights:
    return weights | {"base_model.model.model.embed_tokens.weight": torch.zeros(336, 32)}


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (with_nan, "v_proj are not finite; the file is damaged or training diverged"),
        (with_embeddings, "embed_tokens.weight is no LoRA weight"),
        (lambda w: {k: v for k, v in w.items() if "q_proj" not in k}, "lacks 4 weights that its config promises"),
        (lambda w: {k.replace("q_proj", "query"): v for k, v in w.items()}, "query.lora_A.weight fits no layer"),
        (lambda w: {k.replace("layers.1", "layers.7"): v for k, v in w.items()}, "fits no layer of its base"),
    ],
    ids=["nan", "embeddings", "missing", "renamed", "another depth"],
)
def test_weights_that_are_not_the_adapters_layers_are_refused(
    tiny: dict[str, Path], tmp_path: Path, edit: Callable[[Weights], Weights], problem: str
) -> None:
    folder = edited(shutil.copytree(tiny["red"], tmp_path / "odd"), edit)
    assert problem in refusal(tiny["llama"], folder, beside=tiny["green"])


def test_an_adapter_of_another_base_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    for_deep = make_adapter(tmp_path / "deep", tiny["deep"], seed=0)
    for_gpt2 = make_adapter(tmp_path / "gpt2", tiny["gpt2"], seed=0)
    assert "layers.2.mlp.down_proj.lora_A.weight fits no layer of its base" in refusal(tiny["llama"], for_deep)
    assert "cannot be loaded on its base" in refusal(tiny["llama"], for_gpt2)


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "NEWER"})),
        shutil.rmtree,
    ],
    ids=["truncated", "no weights", "broken config", "unknown type", "no folder"],
)
def test_damaged_folders_are_refused_with_their_path(
    tiny: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = shutil.copytree(tiny["red"], tmp_path / "odd")
    damage(folder)
    message = refusal(tiny["llama"], folder)
    assert str(folder) in message and "is it a PEFT folder" in message
