"""Members whose vocabularies extend each other, in the engine, against each member alone through plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ensemble_server.ensembles.base import Answer, GenerationRequest, Grammar, Mixture, Sampling, collect
from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.members import load_members
from ensemble_server.server.engines.transformers_engine.step_costs import StepCosts
from ensemble_server.server.weights.member_views import read_member_files
from tests.conftest import make_model
from tests.reference import member_logprobs
from tests.server.engines.transformers_engine.test_numerics import OnEngine

TOLERANCE_NATS = 1e-3
TOKENS = {"base": 320, "chat": 322, "tool": 321}  # <pad> is 320, <tool> is 321
MIXTURES = {
    "arithmetic": Mixture({"base": 1, "chat": 3}),
    "arithmetic, the first has more": Mixture({"chat": 1, "base": 1, "tool": 2}),
    "geometric": Mixture({"base": 1, "chat": 3}, "geometric"),
    "geometric, contrastive": Mixture({"chat": 1.5, "base": -0.5}, "geometric"),
    "posterior": Mixture({"base": 1, "chat": 1, "tool": 1}, "posterior", 0.05),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`chat` has added <pad> and <tool>; `tool` has <pad> in its tokenizer and in its weights, as padding of others."""
    root = tmp_path_factory.mktemp("family")
    return {
        "base": make_model(root / "base", vocab_size=336),  # rows beyond its 320 tokens are padding
        "chat": make_model(root / "chat", seed=1, vocab_size=322, extra=("<pad>", "<tool>")),
        "tool": make_model(root / "tool", seed=2, vocab_size=328, extra=("<pad>",)),
    }


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[TransformersEngine]:
    models = {name: HostedModel(path=str(folder)) for name, folder in folders.items()}
    files = read_member_files(models, relative_to=Path(), max_context=256)
    engine = TransformersEngine(load_members(models, files))
    engine.start()
    yield engine
    engine.stop()


def ask(prompt: str | Sequence[int], max_tokens: int = 12, **changes: object) -> GenerationRequest:
    settings = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True} | changes
    return GenerationRequest(prompt=prompt, sampling=Sampling(**settings), top_logprobs=3, explain=True)


@lru_cache
def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def own_ids(folders: Mapping[str, Path], name: str, token_ids: Sequence[int]) -> list[int]:
    """What the member reads: an added token that it lacks in its own tokens for that text."""
    texts = {320: "<pad>", 321: "<tool>"}
    tokenizer = tokenizer_in(folders[name])
    return [
        own
        for token_id in token_ids
        for own in ([token_id] if token_id < TOKENS[name] else tokenizer.encode(texts[token_id]))
    ]


def next_logprobs(folders: Mapping[str, Path], name: str, token_ids: Sequence[int]) -> np.ndarray:
    """(322,): what the member gives every token of the family after this text."""
    rows = member_logprobs(folders[name], None, own_ids(folders, name, token_ids), TOKENS[name])
    return np.concatenate([rows[-1], np.full(322 - TOKENS[name], -np.inf)])


def expected(
    folders: Mapping[str, Path], mixture: Mixture, text: Sequence[int], prompt_length: int
) -> list[np.ndarray]:
    """After the prompt and each further token, by the formulas of the pools, token by token in float64."""
    names = list(mixture.weights)
    weights = prior = np.array(list(mixture.weights.values())) / sum(mixture.weights.values())
    rows = []
    for end in range(1, len(text)):
        given = np.stack([next_logprobs(folders, name, text[:end]) for name in names])
        if end >= prompt_length:
            rows.append(_pooled(mixture, given, weights))
        if mixture.pool == "posterior":
            evidence = weights * np.exp(given[:, text[end]])
            weights = (1 - mixture.share) * evidence / evidence.sum() + mixture.share * prior
    return rows


def _pooled(mixture: Mixture, given: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if mixture.pool != "geometric":
        with np.errstate(divide="ignore"):  # a token that nobody in the mixture has
            return np.log(weights @ np.exp(given))
    raw = np.array(list(mixture.weights.values()))
    scores = np.full(given.shape[1], -np.inf)
    for x in range(given.shape[1]):
        has = np.isfinite(given[:, x])
        if has.all():
            scores[x] = (raw if (raw < 0).any() else raw / raw.sum()) @ given[:, x]
        elif not (raw < 0).any():
            scores[x] = raw[has] @ given[has, x] / raw[has].sum()
    return scores - np.logaddexp.reduce(scores)


def check(folders: Mapping[str, Path], mixture: Mixture, answer: Answer) -> None:
    prompt = list(answer.prompt.token_ids)
    choice = answer.choices[0]
    rows = expected(folders, mixture, prompt + choice.token_ids, len(prompt))
    for row, token in zip(rows, choice.tokens, strict=True):
        assert np.exp(row).sum() == pytest.approx(1, abs=1e-6)
        for entry in (token, *token.top):
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=TOLERANCE_NATS)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("wanted", [None, 320, 321], ids=["free", "<pad>", "<tool>"])
async def test_each_pool_gives_every_token_the_probability_that_its_formula_says(
    engine: TransformersEngine, folders: dict[str, Path], mixture: Mixture, wanted: int | None
) -> None:
    """Also after added tokens were drawn, which a bias makes sure of where the pool allows them."""
    changes = {} if wanted is None else {"logit_bias": {wanted: 60.0}, "temperature": 1.0, "seed": 5}
    answer = await collect(OnEngine(engine, mixture), ask("To be, or", 5, **changes))
    if wanted is not None and min(mixture.weights.values()) > 0:
        assert wanted in answer.choices[0].token_ids
    if wanted is not None and min(mixture.weights.values()) < 0:
        assert wanted not in answer.choices[0].token_ids  # a contrast leaves out what somebody lacks
    check(folders, mixture, answer)


async def test_text_and_stop_of_a_token_that_only_a_later_member_has(engine: TransformersEngine) -> None:
    mixture = OnEngine(engine, Mixture({"base": 1, "chat": 1}))
    answer = await collect(mixture, ask("To be", 3, logit_bias={321: 100.0}))
    assert answer.text == "<tool><tool><tool>"
    assert [token.text for token in answer.choices[0].tokens] == ["<tool>"] * 3
    lacking = answer.choices[0].tokens[0].members
    assert lacking["base"].logprob == -np.inf and np.isfinite(lacking["chat"].logprob)
    stopped = await collect(mixture, ask("To be", 3, logit_bias={321: 100.0}, stop=("<tool>",)))
    assert (stopped.text, stopped.choices[0].finish_reason) == ("", "stop")


async def test_a_prompt_with_an_added_token_is_read_by_each_in_its_own_tokens(
    engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    mixture = Mixture({"chat": 1, "base": 2})
    answer = await collect(OnEngine(engine, mixture), ask("call <tool> now", 4))
    assert 321 in answer.prompt.token_ids
    check(folders, mixture, answer)


async def test_alone_or_beside_its_equals_a_member_is_what_it_was(engine: TransformersEngine) -> None:
    alone = await collect(OnEngine(engine, Mixture({"chat": 1})), ask("To be, or"))
    heavy = await collect(OnEngine(engine, Mixture({"chat": 1, "base": 1e-6})), ask("To be, or"))
    for one, other in zip(alone.choices[0].tokens, heavy.choices[0].tokens, strict=True):
        assert one.token_id == other.token_id and one.logprob == pytest.approx(other.logprob, abs=1e-3)


async def test_mixtures_of_different_widths_share_a_step(engine: TransformersEngine, folders: dict[str, Path]) -> None:
    import asyncio

    mixtures = [*MIXTURES.values(), Mixture({"base": 1, "tool": 1}), Mixture({"chat": 1}), Mixture({"base": 1})]
    answers = await asyncio.gather(*(collect(OnEngine(engine, mixture), ask("To be, or", 4)) for mixture in mixtures))
    for mixture, answer in zip(mixtures, answers, strict=True):
        check(folders, mixture, answer)


async def test_a_grammar_holds_in_a_family(engine: TransformersEngine) -> None:
    grammar = Grammar("regex", "(yes|no)")
    answer = await collect(OnEngine(engine, Mixture({"base": 1, "chat": 1})), ask("Well", 12, grammar=grammar))
    assert answer.text in ("yes", "no")


async def test_a_text_to_be_scored_by_all_may_only_have_tokens_of_all(engine: TransformersEngine) -> None:
    with pytest.raises(RequestError, match="token id 321 is no token of member 'base'"):
        await engine.visit_logprobs(["chat", "base"], [5, 321, 6], lambda *_: None)
    widths: list[int] = []
    await engine.visit_logprobs(["chat", "base"], [5, 7, 6], lambda rows, _: widths.append(rows.shape[-1]))
    assert set(widths) == {322}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arithmetic", "arithmetic, the first has more", "geometric", "posterior"])
async def test_a_draft_ends_before_a_token_that_not_all_have(
    engine: TransformersEngine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of four tokens that are drawn two are added ones: they follow drafts, and drafts follow them."""
    mixture = MIXTURES[name]
    monkeypatch.setattr(StepCosts, "seconds", lambda self, num_tokens: np.ones(len(num_tokens)))
    steps: list[StepStats] = []
    drafting = TransformersEngine(engine._members, drafts="member", on_step=steps.append)
    drafting.start()
    request = ask("To be, or not to be", 40, logit_bias={60: 100.0, 61: 100.0, 320: 104.0, 321: 104.0}, temperature=3.0)
    request = replace(request, sampling=replace(request.sampling, seed=3))
    try:
        ours, plain = [await collect(OnEngine(each, mixture), request) for each in (drafting, engine)]
    finally:
        drafting.stop()
    assert ours.choices[0].token_ids == plain.choices[0].token_ids
    assert {320, 321} & set(ours.choices[0].token_ids)
    for token, other in zip(ours.choices[0].tokens, plain.choices[0].tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=TOLERANCE_NATS)
    assert sum(sum(step.num_accepted.values()) for step in steps) > 0


def test_what_only_looks_alike_is_averaged_over_text(tmp_path: Path, folders: dict[str, Path]) -> None:
    other = make_model(tmp_path / "other", vocab_size=322, extra=("<tool>", "<pad>"))
    models = {"chat": HostedModel(path=str(folders["chat"])), "other": HostedModel(path=str(other))}
    loaded = load_members(models, read_member_files(models, relative_to=Path(), max_context=64))
    engine = TransformersEngine(loaded)
    assert engine.averages_over(Mixture({"chat": 1, "other": 1})) == "bytes"
    assert engine.averages_over(Mixture({"chat": 1})) == "tokens"
