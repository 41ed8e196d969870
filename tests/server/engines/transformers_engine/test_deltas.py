"""Members with deltas in one forward with their base and its adapters, against plain transformers models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.deltas.compress import Plan, compressed
from ensemble_server.server.deltas.difference import difference
from ensemble_server.server.deltas.writing import write_delta
from ensemble_server.server.engines.transformers_engine import deltas as engine_deltas
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.four_bit import FourBitMatrix, has_four_bit_products
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import load_members
from ensemble_server.server.weights.adapters import adapter_of, check_adapter
from ensemble_server.server.weights.delta_folder import METHODS
from ensemble_server.server.weights.deltas import read_delta
from ensemble_server.server.weights.member_views import read_member_files
from tests.conftest import make_model
from tests.server.deltas.conftest import make_finetune
from tests.thinned import first_fast

VOCAB = 320
TEXT = [7, 50, 301, 12, 12, 99, 240, 3, 64, 5, 200]
NATS = 1e-3
SCALE = 0.001  # real fine-tunes move weights so far
FOUR_BITS = 1 / 200  # of what a delta changes: products of four bits are computed in bfloat16
MakeDeltas = Callable[[str], dict[str, Path]]


def make_delta(folder: Path, tuned: Path, base: Path, method: str, **kept: str) -> Path:
    changed = difference(tuned, base, **kept)  # type: ignore[arg-type]
    [found] = compressed(changed, [Plan(method, Fraction(1, 2))], max_tokens=512)  # type: ignore[arg-type]
    write_delta(found, changed, folder, base=str(base), finetune=str(tuned), chat_template=None)
    return folder


@pytest.fixture(scope="module")
def deltas_of(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> MakeDeltas:
    """A delta of each method, of fine-tunes as small as real ones are."""
    made: dict[str, dict[str, Path]] = {}

    def deltas_of(base: str) -> dict[str, Path]:
        if base not in made:
            root = tmp_path_factory.mktemp(base)
            made[base] = {}
            for seed, method in enumerate(METHODS):
                tuned = make_finetune(root / f"tuned-{method}", tiny[base], seed=seed, scale=SCALE)
                made[base][f"{method}-v1.0"] = make_delta(root / method, tuned, tiny[base], method)
        return made[base]

    return deltas_of


def plain_logprobs(base: Path, folder: Path | None) -> torch.Tensor:
    """(len(TEXT), VOCAB) of transformers' model with the delta's weights added to those of its base."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        if folder is not None:
            delta, parameters = read_delta(folder), dict(model.named_parameters())
            for path, matrix in delta.matrices.items():
                dense = matrix.dense()
                is_turned = isinstance(model.get_submodule(path), Conv1D)
                parameters[f"{path}.weight"].add_(dense.T if is_turned else dense)
            for name, kept in delta.kept.items():
                parameters[name].copy_(kept)
        return torch.log_softmax(model(torch.tensor([TEXT])).logits[0, :, :VOCAB], -1)


def load(base: Path, deltas: Mapping[str, Path], adapters: Mapping[str, Path] | None = None) -> Backbone:
    return Backbone.load(base, dtype="float32", device="cpu", adapters=adapters or {}, deltas=deltas, vocab_size=VOCAB)


def tolerance(name: str | None, change: torch.Tensor) -> float:
    """change: (n, VOCAB), what the delta of that name changes in the log-probabilities of its base."""
    is_packed = (
        name is not None and name.startswith(("delta-come", "bitdelta")) and engine_deltas.has_four_bit_products()
    )
    return NATS + (FOUR_BITS * float(change.abs().max()) if is_packed else 0)


def check_rows(base: Path, backbone: Backbone, deltas: Mapping[str, Path]) -> None:
    """Prompts and single tokens of the base and all deltas, side by side, logits of some of their tokens."""
    expected = {None: plain_logprobs(base, None)}
    expected |= {name: plain_logprobs(base, folder) for name, folder in deltas.items()}
    owners = [*deltas, None, *deltas]
    spans = [Span(RowCache(), TEXT, 1 + i % 3, owner) for i, owner in enumerate(owners)]
    for owner, span, found in zip(owners, spans, backbone.forward(spans), strict=True):
        atol = tolerance(owner, expected[owner] - expected[None])
        torch.testing.assert_close(found, expected[owner][-span.num_keep :], atol=atol, rtol=0)
    for name in deltas:  # alone, and the last token by itself
        cache = RowCache()
        backbone.forward([Span(cache, TEXT[:-1], 0, name)])
        [found] = backbone.forward([Span(cache, TEXT[-1:], 1, name)])
        atol = tolerance(name, expected[name] - expected[None])
        torch.testing.assert_close(found, expected[name][-1:], atol=atol, rtol=0)
        assert (expected[name] - expected[None]).abs().max() > 10 * NATS  # or the test would not tell them apart


@pytest.mark.parametrize("base", first_fast(["llama", "gpt2", "qwen", "gemma"]))
def test_deltas_of_all_methods_in_one_batch_equal_plain_models(
    tiny: dict[str, Path], deltas_of: MakeDeltas, base: str
) -> None:
    deltas = deltas_of(base)
    check_rows(tiny[base], load(tiny[base], deltas), deltas)


def test_the_same_without_products_of_four_bits(
    tiny: dict[str, Path], deltas_of: MakeDeltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_deltas, "has_four_bit_products", lambda: False)
    deltas = deltas_of("llama")
    check_rows(tiny["llama"], load(tiny["llama"], deltas), deltas)


def test_adapters_beside_deltas_stay_what_they_are(tiny: dict[str, Path], deltas_of: MakeDeltas) -> None:
    adapters, deltas = {"red": tiny["red"], "blue": tiny["blue"]}, deltas_of("llama")
    alone, together = load(tiny["llama"], {}, adapters), load(tiny["llama"], deltas, adapters)
    owners = ["red", "blue", None]
    rows = [backbone.forward([Span(RowCache(), TEXT, 4, o) for o in owners]) for backbone in (alone, together)]
    for one, other in zip(*rows, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    check_rows(tiny["llama"], together, deltas)


def test_a_tied_head_follows_its_own_embedding(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    tuned = make_finetune(tmp_path / "tuned", base, scale=SCALE)
    deltas = {"own": make_delta(tmp_path / "delta", tuned, base, "svd")}
    assert read_delta(deltas["own"]).kept.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}
    check_rows(base, load(base, deltas), deltas)


def test_biases_of_layers_are_the_members_own(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2")
    tuned = make_finetune(tmp_path / "tuned", base, scale=SCALE)
    deltas = {"bitdelta": make_delta(tmp_path / "delta", tuned, base, "bitdelta")}
    assert any(name.endswith("q_proj.bias") for name in read_delta(deltas["bitdelta"]).kept)
    check_rows(base, load(base, deltas), deltas)


@pytest.mark.slow
def test_the_base_is_read_once_for_all_members(
    tiny: dict[str, Path], deltas_of: MakeDeltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(tiny["llama"], deltas_of("llama"))
    layers = [module for name, module in backbone.model.named_modules() if name.endswith("q_proj")]
    plain = layers[0]
    while hasattr(plain, "base"):
        plain = plain.base
    calls: list[torch.Size] = []
    monkeypatch.setattr(plain, "forward", lambda x, forward=plain.forward: calls.append(x.shape) or forward(x))
    backbone.forward([Span(RowCache(), TEXT, 1, owner) for owner in (None, *deltas_of("llama"))])
    assert calls == [(1, 5 * len(TEXT), 32)]


def test_a_matrix_of_four_bits_is_what_its_codes_say() -> None:
    if not has_four_bit_products():
        pytest.skip("this CPU has none")
    torch.manual_seed(0)
    codes, scales, offsets = torch.randint(-8, 8, (50, 72)), torch.rand(50, 3), torch.randn(50, 3)
    dense = codes * scales.repeat_interleave(32, 1)[:, :72] + offsets.repeat_interleave(32, 1)[:, :72]
    x = torch.randn(3, 72)
    found = FourBitMatrix(codes, scales, offsets)(x)
    torch.testing.assert_close(found, x @ dense.T, atol=0.02 * float((x @ dense.T).abs().max()), rtol=0)


async def test_a_pool_of_base_adapter_and_deltas_is_that_of_plain_models(
    tiny: dict[str, Path], deltas_of: MakeDeltas
) -> None:
    """As a config has them, with the engine's own reading of a text in chunks."""
    folders = {name.partition("-v")[0]: folder for name, folder in deltas_of("llama").items()}
    models = {"llama": HostedModel(path=str(tiny["llama"])), "red": HostedModel(base="llama", adapter=str(tiny["red"]))}
    models |= {name: HostedModel(base="llama", delta=str(folder)) for name, folder in folders.items()}
    members = load_members(models, read_member_files(models, relative_to=Path(), max_context=256))
    assert len({id(member.backbone) for member in members.values()}) == 1
    shown: list[torch.Tensor] = []
    engine = TransformersEngine(members, prefill_chunk=3)
    engine.start()
    try:
        await engine.visit_logprobs(
            tuple(models), tuple(TEXT), lambda logprobs, targets: shown.append(logprobs.clone())
        )
    finally:
        engine.stop()
    found = dict(zip(models, torch.cat(shown, dim=1), strict=True))
    expected = {name: plain_logprobs(tiny["llama"], folder)[:-1] for name, folder in folders.items()}
    expected["llama"] = plain_logprobs(tiny["llama"], None)[:-1]
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, atol=tolerance(name, rows - expected["llama"]), rtol=0)
    weights = torch.full((len(models), 1, 1), 1 / len(models)).log()
    expected["red"] = found["red"]  # is tested against PEFT elsewhere
    pooled, plain = (
        (torch.stack([rows[name] for name in models]) + weights).logsumexp(0) for rows in (found, expected)
    )
    torch.testing.assert_close(pooled, plain, atol=NATS, rtol=0)


# --- what is refused ---


def test_a_delta_of_another_base_is_refused(tiny: dict[str, Path], deltas_of: MakeDeltas, tmp_path: Path) -> None:
    deltas = {"math": deltas_of("llama")["dare-v1.0"]}
    with pytest.raises(ModelLoadError, match=r"delta 'math' at .*: it was made for other weights"):
        load(make_model(tmp_path / "other", seed=99), deltas)
    with pytest.raises(ModelLoadError, match=r"delta 'math' at .*: "):
        load(tiny["deep"], deltas)
    with pytest.raises(ModelLoadError, match=r"delta 'math' at .*a layer .*, which this one lacks"):
        load(tiny["gpt2"], deltas)


def test_only_a_delta_that_is_an_adapter_runs_as_one(
    tiny: dict[str, Path], deltas_of: MakeDeltas, tmp_path: Path
) -> None:
    tuned = make_finetune(tmp_path / "tuned", tiny["llama"])
    plain = make_delta(tmp_path / "plain", tuned, tiny["llama"], "svd", embeddings="base", vectors="base")
    entry = HostedModel(base="base", delta=str(plain))
    assert adapter_of("math", entry) == plain
    check_adapter("math", plain)
    for method, reason in (("svd", "that it keeps"), ("bitdelta", "of method bitdelta")):
        folder = deltas_of("llama")[f"{method}-v1.0"]
        with pytest.raises(ModelLoadError, match=f"'math': a delta .*{reason}.* transformers engine only"):
            adapter_of("math", HostedModel(base="base", delta=str(folder)))
        with pytest.raises(ModelLoadError, match="write `delta` in place of `adapter`"):
            check_adapter("math", folder)
