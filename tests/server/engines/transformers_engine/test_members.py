from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine import members
from ensemble_server.server.engines.transformers_engine.members import Member, load_members
from ensemble_server.server.weights.footprint import read_weights
from ensemble_server.server.weights.member_views import read_member_files
from ensemble_server.server.weights.vocabularies import family_of
from tests.conftest import CHAT_TEMPLATE, make_model


def load(max_context: int = 256, *, relative_to: Path = Path(), **models: HostedModel) -> dict[str, Member]:
    files = read_member_files(models, relative_to=relative_to, max_context=max_context)
    return load_members(models, files)


def refusal(**models: HostedModel) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(**models)
    return str(caught.value)


@pytest.fixture(scope="module")
def family(tiny: dict[str, Path]) -> dict[str, Member]:
    path = str(tiny["llama"])
    return load(
        base=HostedModel(path=path, system_prompt="Be brief."),
        again=HostedModel(path=path),
        half=HostedModel(path=path, dtype="bfloat16"),
        red=HostedModel(base="base", adapter=str(tiny["red"])),
        blue=HostedModel(base="again", adapter=str(tiny["blue"]), system_prompt="Sing."),
        plain=HostedModel(base="base", system_prompt=""),
        terse=HostedModel(base="base", chat_template="{{ messages[-1].content }}"),
    )


# --- weights ---


def test_weights_are_loaded_once_for_all_that_stand_on_them(family: dict[str, Member]) -> None:
    backbones = {name: id(member.backbone) for name, member in family.items()}
    assert len({backbones[name] for name in ("base", "again", "red", "blue", "plain", "terse")}) == 1
    assert backbones["half"] != backbones["base"]


def test_a_member_keeps_the_order_name_and_adapter_of_its_entry(family: dict[str, Member]) -> None:
    assert list(family) == ["base", "again", "half", "red", "blue", "plain", "terse"]
    assert all(name == member.name for name, member in family.items())
    adapters = {name: member.adapter for name, member in family.items() if member.adapter is not None}
    assert adapters == {"red": "red", "blue": "blue"}


def test_relative_paths_start_at_the_configs_folder(tiny: dict[str, Path]) -> None:
    member = load(relative_to=tiny["llama"].parent, base=HostedModel(path="llama"))["base"]
    assert member.vocab_size == 320


def test_the_context_is_the_smaller_of_the_configs_and_the_models(tiny: dict[str, Path]) -> None:
    entry = HostedModel(path=str(tiny["gpt2"]))
    assert load(100, base=entry)["base"].max_model_len == 100
    assert load(9999, base=entry)["base"].max_model_len == 512


def test_end_of_text_is_what_checkpoint_or_tokenizer_call_so(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert load(base=HostedModel(path=str(folder)))["base"].eos_ids == {0, 7, 2}


# --- views of text ---


def text_for(member: Member, *messages: tuple[str, str]) -> str:
    rendered = member.surface.render([{"role": role, "content": content} for role, content in messages])
    return member.surface.tokenizer.decode(rendered)


def test_a_view_takes_over_what_it_does_not_say_itself(family: dict[str, Member]) -> None:
    hello = ("user", "Hi")
    briefly = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text_for(family["base"], hello) == text_for(family["red"], hello) == briefly
    assert text_for(family["blue"], hello) == briefly.replace("Be brief.", "Sing.")
    assert (
        text_for(family["again"], hello)
        == text_for(family["plain"], hello)
        == briefly[briefly.index("<|im_start|>u") :]
    )
    assert text_for(family["terse"], ("user", "Hi"), ("user", "There")) == "There"
    assert family["red"].surface.chat_template == CHAT_TEMPLATE


def test_a_system_prompt_without_a_template_is_refused_by_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    message = refusal(base=HostedModel(path=str(folder)), polite=HostedModel(base="base", system_prompt="Please."))
    assert message.startswith("model 'polite': system_prompt needs a chat template")


# --- one vocabulary ---


def test_models_of_one_vocabulary_may_differ_in_shape_and_padding(tiny: dict[str, Path]) -> None:
    members = load(**{name: HostedModel(path=str(tiny[name])) for name in ("llama", "deep", "gpt2")})
    widths = {name: member.backbone.model.get_input_embeddings().num_embeddings for name, member in members.items()}
    assert widths == {"llama": 336, "deep": 384, "gpt2": 336}
    assert {member.vocab_size for member in members.values()} == {320}
    assert family_of(list(members.values())).is_uniform


# --- what cannot be loaded ---


def test_a_missing_folder_is_refused_by_name(tiny: dict[str, Path]) -> None:
    message = refusal(base=HostedModel(path=str(tiny["llama"])), gone=HostedModel(path=str(tiny["llama"] / "gone")))
    assert message.startswith("model 'gone': ") and str(tiny["llama"] / "gone") in message


def test_a_folder_without_tokenizer_is_refused_by_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refusal(base=HostedModel(path=str(folder)))
    assert message.startswith("model 'base': ") and "has no tokenizer that loads" in message


@pytest.mark.parametrize("size", [0, 100, -100])
def test_damaged_weights_are_refused_by_name(tiny: dict[str, Path], tmp_path: Path, size: int) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = refusal(base=HostedModel(path=str(folder)))
    assert message.startswith("model 'base': ") and "model.safetensors" in message


def test_a_damaged_tokenizer_is_refused_by_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    assert "model 'base': " in refusal(base=HostedModel(path=str(folder)))


def test_a_damaged_adapter_is_refused_by_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(tiny["red"], tmp_path / "red")
    (adapter / "adapter_model.safetensors").unlink()
    message = refusal(base=HostedModel(path=str(tiny["llama"])), red=HostedModel(base="base", adapter=str(adapter)))
    assert "adapter 'red'" in message and str(adapter) in message


def test_an_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "bloom", "bloom", n_layer=2, n_head=4)
    assert refusal(odd=HostedModel(path=str(folder))).startswith("model 'odd': ")


def test_loading_is_quiet(tiny: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(base=HostedModel(path=str(tiny["llama"])), red=HostedModel(base="base", adapter=str(tiny["red"])))
    assert capfd.readouterr() == ("", "")


def test_auto_spreads_weights_over_accelerators_and_leaves_named_devices_alone(tiny, monkeypatch) -> None:
    """The accelerators are pretended, since none is here: what is looked at is where weights would go."""
    monkeypatch.setattr(members, "rooms", lambda: [10**9, 10**9 - 1])
    monkeypatch.setattr(members, "resolve_device", lambda device: "cuda" if device == "auto" else device)
    models = {
        "one": HostedModel(path=str(tiny["llama"])),
        "red": HostedModel(base="one", adapter=str(tiny["red"])),
        "again": HostedModel(path=str(tiny["llama"])),
        "two": HostedModel(path=str(tiny["deep"])),
        "here": HostedModel(path=str(tiny["llama"]), device="cpu"),
    }
    files = read_member_files(models, relative_to=Path(), max_context=64)
    keys = members.placed(models, files)
    larger, smaller = sorted(("one", "two"), key=lambda name: -read_weights(files.checkpoints[name]).num_bytes)
    assert (keys[larger].device, keys[smaller].device, keys["here"].device) == ("cuda:0", "cuda:1", "cpu")
    assert keys["again"] == keys["one"], "equal weights are loaded once"
