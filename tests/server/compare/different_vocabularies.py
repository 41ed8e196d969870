"""Members of different vocabularies in a config, and what plain transformers say of a text that they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ensemble_server.ensembles.base import Message
from ensemble_server.ensembles.spelling.given_text import GivenText
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.weights.member_views import read_member_files
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary
from tests.conftest import make_model
from tests.reference import member_logprobs
from tests.server.engines.transformers_engine.vocabularies import byte_fallback

POOLS = {
    "mix": {"members": {"llama": 1, "gemma": 3}},
    "adaptive": {"members": ["llama", "gemma"], "pool": "posterior", "share": 0.05},
    "product": {"members": ["llama", "gemma"], "pool": "geometric"},
    "contrast": {"members": {"llama": 1, "gemma": -0.2}, "pool": "geometric"},
}


def config_over(tiny: dict[str, Path], folder: Path, **more: object) -> Config:
    """llama (byte-level BPE) and gemma (SentencePiece with byte fallback), their pools; `folder`: for gemma."""
    if not folder.exists():
        byte_fallback(make_model(folder, "gemma3_text", seed=5, vocab_size=440))
    models = {
        "llama": {"path": str(tiny["llama"]), "dtype": "float32"},
        "gemma": {"path": str(folder), "dtype": "float32"},
    }
    pools = {name: {"method": "probability_average", **pool} for name, pool in POOLS.items()}
    return parse_config({"models": models | pools | more}, source=Path("config.yaml"))


def plain_evidence(
    config: Config, name: str, text: str, after: Sequence[Message] | None = None
) -> tuple[int, np.ndarray]:
    """-> where the member's expectations begin, and the evidence for each byte from there on, by plain forwards."""
    hosted = {name: config.models[name]}
    member = read_member_files(hosted, relative_to=Path(), max_context=256).views[name]
    vocabulary = spelled_vocabulary(member)
    if after is None:
        ids = member.surface.encode(text)
        num_before = max(1, sum(not vocabulary.token_bytes[token_id] for token_id in ids))
        begin, path = ids[:num_before], ids[num_before:]
    else:
        begin, path = member.surface.render(after), member.surface.encode(text, add_special_tokens=False)

    def distribution(token_ids: Sequence[int]):
        row = member_logprobs(Path(config.models[name].path), None, token_ids, member.vocab_size)[-1]
        return vocabulary.order.distributions(torch.from_numpy(row)[None])[0]

    begins_at = len(text.encode()) - sum(len(vocabulary.token_bytes[token_id]) for token_id in path)
    given = GivenText(distribution(begin), text.encode()[begins_at:])
    given.follow(path, vocabulary.token_bytes)
    while given.wanted:
        for history in list(given.wanted):
            given.give(history, distribution([*begin, *history.tokens()]))
        given.settle()
    return begins_at, given.evidence()


def common_evidence(config: Config, names: Sequence[str], text: str, **options: object) -> np.ndarray:
    """(K, T): of the bytes that all members can expect"""
    found = [plain_evidence(config, name, text, **options) for name in names]
    begin = max(begins_at for begins_at, _ in found)
    return np.stack([row[begin - begins_at :] for begins_at, row in found])
