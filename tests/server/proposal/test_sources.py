from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.server.proposal.sources import entries_of, found_around
from tests.listening import QuietHandler, listening


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def adapter(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_folders_files_and_ids_become_entries_named_after_themselves(tmp_path: Path) -> None:
    model(tmp_path / "runs" / "tuned")
    (tmp_path / "small.Q4.gguf").touch()
    entries = entries_of(["runs/tuned", "small.Q4.gguf", "org/Name-1.5B"], folder=tmp_path)
    assert entries.hosted == {
        "tuned": {"path": "./runs/tuned"},
        "small.Q4": {"path": "./small.Q4.gguf"},
        "Name-1.5B": {"path": "org/Name-1.5B"},
    }


def test_a_generic_name_takes_its_folders_and_equal_names_are_numbered(tmp_path: Path) -> None:
    for path in ("a/checkpoint-500", "b/tuned", "c/tuned"):
        model(tmp_path / path)
    names = list(entries_of(["a/checkpoint-500", "b/tuned", "c/tuned"], folder=tmp_path).hosted)
    assert names == ["a-checkpoint-500", "tuned", "tuned-2"]


def test_what_lies_outside_the_configs_folder_has_an_absolute_path(tmp_path: Path) -> None:
    outside = model(tmp_path / "outside")
    (tmp_path / "here").mkdir()
    entries = entries_of(["../outside"], folder=tmp_path / "here")
    assert entries.hosted == {"outside": {"path": str(outside)}}


def test_a_folder_of_models_stands_for_all_of_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        model(tmp_path / "zoo" / name)
    (tmp_path / "zoo" / "three.gguf").touch()
    assert list(entries_of(["zoo"], folder=tmp_path).hosted) == ["one", "two", "three"]


# --- adapters ---


def test_an_adapter_finds_its_base_among_what_was_given(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    for name, written in (("absolute", str(base)), ("relative", "../base")):
        adapter(tmp_path / name, written)
        entries = entries_of([name, "base"], folder=tmp_path)
        assert entries.adapters == {name: {"base": "base", "adapter": f"./{name}"}}
        assert entries.hosted == {"base": {"path": "./base"}}


def test_a_delta_finds_its_base_as_an_adapter_does(tmp_path: Path) -> None:
    model(tmp_path / "base")
    for method, files in (("bitdelta", ["delta.safetensors"]), ("svd", ["adapter_model.safetensors"])):
        folder = adapter(tmp_path / method, "./base") if method == "svd" else tmp_path / method
        folder.mkdir(exist_ok=True)
        card = {"format": 1, "method": method, "kept": [], "base": str(tmp_path / "base")}
        (folder / "delta.json").write_text(json.dumps(card))
        for file in files:
            (folder / file).write_bytes(b"")
        entries = entries_of(["./base", f"./{method}"], folder=tmp_path)
        assert entries.adapters == {method: {"base": "base", "delta": f"./{method}"}}


def test_an_adapter_of_a_hub_model_takes_the_folder_of_that_name_or_else_the_hub_id(tmp_path: Path) -> None:
    model(tmp_path / "SmolLM")
    adapter(tmp_path / "expert", "Some-Org/SmolLM")
    for arguments, path in ((["SmolLM", "expert"], "./SmolLM"), (["expert"], "Some-Org/SmolLM")):
        entries = entries_of(arguments, folder=tmp_path)
        assert entries.hosted == {"SmolLM": {"path": path}}
        assert entries.adapters == {"expert": {"base": "SmolLM", "adapter": "./expert"}}


def test_two_adapters_of_one_base_share_it(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    for name in ("red", "blue"):
        adapter(tmp_path / name, str(base))
    entries = entries_of(["red", "blue"], folder=tmp_path)
    assert list(entries.hosted) == ["base"]
    assert {keys["base"] for keys in entries.adapters.values()} == {"base"}


# --- what is refused ---


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("./gone", "neither a folder"),
        ("gone", "neither a folder"),
        ("notes.txt", "is a file that is not .gguf"),
        ("empty", "holds no model"),
        ("nameless", "does not name its base"),
        ("damaged", "not valid JSON"),
    ],
)
def test_an_argument_that_is_no_model_is_named(tmp_path: Path, argument: str, reason: str) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    adapter(tmp_path / "nameless", "")
    (adapter(tmp_path / "damaged", "x") / "adapter_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=reason) as caught:
        entries_of([argument], folder=tmp_path)
    assert argument.strip("./") in str(caught.value)


# --- servers ---


@pytest.fixture
def server() -> Iterator[str]:
    """Lists four models, of which two embed, for a key."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            is_allowed = self.headers.get("Authorization") in (None, "Bearer s3cret")
            names = ["llama3.2:1b", "org/qwen", "nomic-embed-text"]
            models = [*({"id": name} for name in names), {"id": "all-MiniLM-L6-v2", "kind": "embedding"}]
            body = json.dumps({"data": models}).encode()
            self.send_response(200 if is_allowed and self.path == "/v1/models" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with listening(Handler) as address:
        yield address


def test_a_servers_models_become_remote_entries_less_those_that_only_embed(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "s3cret")
    for address in (server, f"{server}/", f"{server}/v1"):
        entries = entries_of([address], folder=tmp_path)
        assert entries.remotes == {
            "llama3.2:1b": {"url": f"{server}/v1", "model": "llama3.2:1b"},
            "org-qwen": {"url": f"{server}/v1", "model": "org/qwen"},
        }
    keyed = entries_of([server], folder=tmp_path, api_key_env="THE_KEY")
    assert all(keys["api_key_env"] == "THE_KEY" for keys in keyed.remotes.values())


def test_an_address_where_nothing_answers_and_a_key_that_is_not_set_are_named(tmp_path: Path, server: str) -> None:
    with pytest.raises(ConfigError, match=r"no server answers at http://127\.0\.0\.1:9/v1"):
        entries_of(["http://127.0.0.1:9"], folder=tmp_path)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        entries_of([server], folder=tmp_path, api_key_env="NO_SUCH_KEY")


# --- looking around ---


def test_models_two_levels_below_are_found_and_hidden_folders_are_not(tmp_path: Path) -> None:
    model(tmp_path / "a")
    adapter(tmp_path / "runs" / "lora", "x")
    model(tmp_path / ".cache" / "hidden")
    (tmp_path / "runs" / "w.gguf").touch()
    assert found_around(tmp_path) == ["./a", "./runs/lora", "./runs/w.gguf"]
