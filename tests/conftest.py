"""Tiny real models, made in seconds: random weights, one byte-level vocabulary trained on the spot.

And the engines that run them: what uses the fixture `engine` is run with each.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

MEMORY = Path("/dev/shm")

settings.register_profile("repeatable", deadline=None, derandomize=True)  # a busy machine must not fail a test
settings.load_profile("repeatable")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: tests never ask a hub
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # heeded by transformers, too
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # jobs are synced to disk row by row
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: tensors this small only lose by threads

# One for all clients: each reads 150 certificates otherwise, which is a quarter of the time of the tests of the API.
ssl.create_default_context = functools.cache(ssl.create_default_context)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLE = (
    "The quick brown fox jumps over the lazy dog. def f(x): return x + 1\n"
    'To be, or not to be, that is the question. Ünïcödé 数学 😀 {} [] "key": 12.5, true, false\n'
) * 4

ENGINES = {  # what a config says of each
    "transformers": {"kind": "transformers"},
    "vllm": {"kind": "vllm", "kv_cache_gb": 0.25, "options": {"enforce_eager": True}},
}

# What vLLM's attention on CPUs takes: heads of 32.
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}

ModelMaker = Callable[..., Path]


def make_tokenizer(folder: Path, *, extra: tuple[str, ...] = ()) -> None:
    """A byte-level BPE tokenizer of about 320 tokens with ChatML, saved into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.add_tokens(list(extra))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)


def make_model(
    folder: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = 336,
    extra: tuple[str, ...] = (),
    **changes,
) -> Path:
    """A random causal LM of an architecture, with its tokenizer. `vocab_size` is padded beyond the tokenizer's 320."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    if architecture == "gemma3_text":
        sizes |= {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 3}
        sizes["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]
    if architecture == "qwen3":
        sizes["head_dim"] = 8
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None}
    config = CONFIG_MAPPING[architecture](vocab_size=vocab_size, **(sizes | special | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with (
        torch.no_grad()
    ):  # sharper than a fresh initialisation, so that members differ and greedy text has few near-ties
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    make_tokenizer(folder, extra=extra)
    return folder


def make_adapter(folder: Path, base: Path, *, seed: int, rank: int = 4, **changes) -> Path:
    """A random LoRA adapter (B not zero) on all linear layers of the blocks of a tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, **{"target_modules": "all-linear"} | changes)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    return folder


def make_embedder(folder: Path, words: tuple[str, ...], *, max_tokens: int = 64) -> Path:
    """A random BERT of two layers that knows `words`, as sentence-transformers loads it: equal texts are closest."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=max_tokens)
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling, Normalize()]).save(str(folder / "sentences"))
    return folder / "sentences"


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not look at it again (torch's are a million objects)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models of one vocabulary: llamas of different shapes, other families, adapters of `llama`."""
    root = tmp_path_factory.mktemp("tiny")
    folders = {
        "llama": make_model(root / "llama"),
        "deep": make_model(
            root / "deep", seed=1, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, vocab_size=384
        ),
        "qwen": make_model(root / "qwen", "qwen3", seed=2),
        "gpt2": make_model(root / "gpt2", "gpt2", seed=3),
        "gemma": make_model(root / "gemma", "gemma3_text", seed=4),
    }
    for seed, name in enumerate(("red", "green", "blue"), start=10):
        folders[name] = make_adapter(root / name, folders["llama"], seed=seed, rank=2 + seed % 3)
    return folders


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed: it takes half a second for a report or card, and few tests look at it."""
    for module in ("compare.report.figures", "distill.card"):
        monkeypatch.setattr(f"ensemble_server.server.{module}.find_spec", lambda name: None)


@pytest.fixture(scope="session", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> str:
    """What uses this runs twice: with the embedded engine, and where vLLM is installed (`make test-vllm`) with vLLM."""
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="needs vLLM: make test-vllm", exc_type=ImportError)
    return request.param


@pytest.fixture(scope="session")
def folders(engine: str, tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of `tiny`; for vLLM those that it is to run have heads of 32, as its attention on CPUs wants."""
    if engine == "transformers":
        return tiny
    root = tmp_path_factory.mktemp("wide")
    llama = make_model(root / "llama", **WIDE)
    return tiny | {
        "llama": llama,
        "deep": make_model(root / "deep", seed=1, num_hidden_layers=3, vocab_size=384, **WIDE),
        "red": make_adapter(root / "red", llama, seed=10),
        "green": make_adapter(root / "green", llama, seed=11),
    }
