"""Tokenizers of other families, tiny ones, for members that share no vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.conftest import CHAT_TEMPLATE, SAMPLE

GREEK = (
    "The cafés of Ελλάδα: αβγ δεζ. A quick fox; the question is to be, or not. 12.5 + 7 = 19\n\n\tlazy dogs do\n" * 4
)


def byte_level(folder: Path, *, size: int = 300, sample: str = GREEK, alphabet: bytes = bytes(range(256))) -> None:
    """Byte-level BPE with ChatML, trained on another text than that of `tests.conftest`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    char_of = bytes_to_unicode()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=[char_of[byte] for byte in alphabet],
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample], trainer)
    _save(tokenizer, folder, eos_token="<|im_end|>", bos_token="<s>", chat_template=CHAT_TEMPLATE)


def byte_fallback(folder: Path, *, size: int = 420) -> None:
    """SentencePiece's kind: spaces as "▁", letters as tokens, what is none of them in 256 byte tokens; with a BOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<bos>", "<eos>", "<turn>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE.replace(" ", "▁")], trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    template = (
        "<bos>{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}"
    )
    _save(tokenizer, folder, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", chat_template=template)
    # As in Gemma's: the byte tokens are ordinary ones, some of which are also letters.
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    for token in saved["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["special"]]
    path.write_text(json.dumps(saved))


def word_piece(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([SAMPLE], trainer)
    _save(tokenizer, folder, eos_token="[SEP]", unk_token="[UNK]")


def shuffled(model: Path, folder: Path, *, seed: int = 0) -> Path:
    """A twin of a tiny model whose ids stand in another order, special ones among them: the same model of text."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = json.loads((model / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    new_id = np.random.default_rng(seed).permutation(len(ids)).tolist()
    tokenizer["model"]["vocab"] = {token: new_id[old] for token, old in ids.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = new_id[token["id"]]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in _embeddings(network)}.values():
            weight[new_id] = weight[: len(new_id)].clone()
    for config in (network.config, network.generation_config):
        config.bos_token_id, config.eos_token_id = new_id[config.bos_token_id], new_id[config.eos_token_id]
    network.save_pretrained(folder)
    old = PreTrainedTokenizerFast.from_pretrained(model)
    (folder / "raw.json").write_text(json.dumps(tokenizer))
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "raw.json"),
        eos_token=old.eos_token,
        bos_token=old.bos_token,
        chat_template=old.chat_template,
    ).save_pretrained(folder)
    return folder


def _embeddings(network):
    return network.get_input_embeddings(), network.get_output_embeddings()


def _save(tokenizer, folder: Path, **special: str) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
