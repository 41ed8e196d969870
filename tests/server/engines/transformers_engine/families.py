"""Tiny members of different families, and what plain transformers and a lattice say of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ensemble_server.ensembles.base import GenerationRequest, Mixture, Sampling
from ensemble_server.ensembles.pooling import effective_weights, pool, posterior
from ensemble_server.ensembles.spelling.lattice import Lattice
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.members import Member, load_members
from ensemble_server.server.weights.member_views import read_member_files
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary
from tests.conftest import make_model
from tests.reference import member_logprobs
from tests.server.engines.transformers_engine import vocabularies


class Families:
    """llama, red (its adapter), twin (llama with shuffled ids), gemma (byte fallback), qwen (another byte-level BPE),
    narrow (byte-level without the bytes of emoji)."""

    def __init__(self, root: Path, tiny: Mapping[str, Path]) -> None:
        self.folders = {
            "llama": tiny["llama"],
            "gemma": make_model(root / "gemma", "gemma3_text", seed=5, vocab_size=440),
            "qwen": make_model(root / "qwen", "qwen3", seed=6, vocab_size=300),
            "narrow": make_model(root / "narrow", "qwen3", seed=8, vocab_size=300),
        }
        vocabularies.byte_fallback(self.folders["gemma"])
        vocabularies.byte_level(self.folders["qwen"])
        vocabularies.byte_level(self.folders["narrow"], alphabet=bytes(range(0xF0)))
        self.folders["twin"] = vocabularies.shuffled(tiny["llama"], root / "twin")
        models = {name: HostedModel(path=str(folder)) for name, folder in self.folders.items()}
        models["red"] = HostedModel(base="llama", adapter=str(tiny["red"]))
        models["polite"] = HostedModel(base="llama", system_prompt="Be very polite.")
        self.adapters = {"red": tiny["red"]}
        self.members: dict[str, Member] = load_members(
            models, read_member_files(models, relative_to=Path(), max_context=256)
        )

    @contextmanager
    def running(self, **options: object) -> Iterator[TransformersEngine]:
        engine = TransformersEngine(self.members, **options)
        engine.start()
        try:
            yield engine
        finally:
            engine.stop()

    def lattice(self, name: str, begin: Sequence[int]) -> PlainLattice:
        return PlainLattice(self, name, begin)

    def distribution(self, name: str, token_ids: Sequence[int]):
        member = self.members[name]
        folder = self.folders["llama" if name in ("red", "polite") else name]
        row = member_logprobs(folder, self.adapters.get(name), token_ids, member.vocab_size)[-1]
        return spelled_vocabulary(member).order.distributions(torch.from_numpy(row)[None])[0]


class PlainLattice:
    """A member's lattice over plain forwards of whole texts: no cache, one row, float32."""

    def __init__(self, families: Families, name: str, begin: Sequence[int]) -> None:
        self._families, self._name, self._begin = families, name, list(begin)
        self.lattice = Lattice(families.distribution(name, begin))

    def fork(self) -> PlainLattice:
        twin = copy.copy(self)
        twin.lattice = self.lattice.fork()
        return twin

    def feed(self, byte: int) -> float:
        """-> the evidence"""
        self.lattice.feed(byte)
        while self.lattice.wanted:
            for history in list(self.lattice.wanted):
                ids = [*self._begin, *history.tokens()]
                self.lattice.give(history, self._families.distribution(self._name, ids))
        return self.lattice.evidence


def expected_logprobs(
    mixture: Mixture, lattices: Sequence[PlainLattice], text: bytes, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """-> (T,) pooled log-probability of every byte of `text`, and the weights (K, T) that were used."""
    prior = effective_weights(list(mixture.weights.values()))
    current, logprobs, path = prior if weights is None else weights, [], []
    for byte in text:
        rows = [one.lattice.row(spreads=mixture.pool == "geometric") for one in lattices]
        stacked = torch.from_numpy(np.stack(rows))[:, None]
        row = pool(mixture.pool, stacked, torch.from_numpy(current)[:, None])[0]
        logprobs.append(float(row[byte]))
        path.append(current)
        evidence = [one.feed(byte) for one in lattices]
        if mixture.pool == "posterior":
            current = posterior.update(current, evidence, prior, mixture.share)
    return np.array(logprobs), np.stack(path, axis=1)


def asked(prompt: str = "The quick brown fo", *, max_tokens: int = 12, **options: object) -> GenerationRequest:
    """Greedy, with log-probabilities, unless `options` (of the request or of its sampling) say otherwise."""
    of_sampling = {key: options.pop(key) for key in list(options) if key in Sampling.__dataclass_fields__}
    sampling = Sampling(**({"temperature": 0, "max_tokens": max_tokens} | of_sampling))
    return GenerationRequest(**({"prompt": prompt, "sampling": sampling, "top_logprobs": 0} | options))
