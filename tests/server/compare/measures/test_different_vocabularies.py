"""What a comparison measures of members of different vocabularies, against plain transformers and by enumeration."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.ensembles.fitting.share import posterior_logprobs
from ensemble_server.server.compare.measures.byte_scores import score_bytes
from ensemble_server.server.compare.measures.choice_likelihood import option_logprobs
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.harness import run_harness
from ensemble_server.server.compare.measures.task_measure import Item, Task, measure_task
from ensemble_server.server.compare.measures.text_measure import NotScored, TextScores, measure_text
from ensemble_server.server.compare.measures.windows import cut_text_windows
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.hosting import Hosting
from tests.conftest import SAMPLE
from tests.server.compare.different_vocabularies import common_evidence, config_over, plain_evidence

MEMBERS = ("llama", "gemma")
TEXT = Documents(("The quick 数 and the café. ", "Lazy dogs\n\ndo jump over."), is_continuous=True)
WINDOW = 16
TOLERANCE_NATS = 1e-3  # per byte


@pytest.fixture(scope="module")
def config(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_over(tiny, tmp_path_factory.mktemp("other") / "gemma")


def pooled(name: str, evidence: np.ndarray) -> np.ndarray:
    if name == "adaptive":
        return posterior_logprobs(evidence, np.array([0.5, 0.5]), 0.05)
    return np.log(np.array([0.25, 0.75]) @ np.exp(evidence))


@pytest.mark.slow
async def test_bits_per_byte_are_the_pooled_evidence_of_plain_forwards(config: Config) -> None:
    async with Hosting.open(config) as hosting:
        arms = {name: name for name in ("mix", "adaptive", "product")}
        heard: list[tuple[int, int]] = []
        scores = await measure_text(
            hosting, arms, TEXT, window=WINDOW, on_progress=lambda *progress: heard.append(progress)
        )
        windows = cut_text_windows(hosting.surface("mix"), TEXT, window=WINDOW)
        num_tokens = len(hosting.surface("mix").encode("".join(TEXT.texts)))
    assert len(windows) > 2
    assert heard == [(done, len(windows)) for done in range(1, len(windows) + 1)]  # one pass for all arms
    nats, num_bytes = {name: np.zeros(2) for name in arms}, np.zeros(2)
    for window in windows:
        evidence = common_evidence(config, MEMBERS, window.text)
        num_scored = min(len(window.documents), evidence.shape[1])
        documents = window.documents[len(window.documents) - num_scored :]
        num_bytes += np.bincount(documents, minlength=2)
        for name in ("mix", "adaptive"):
            nats[name] -= np.bincount(documents, pooled(name, evidence)[-num_scored:], 2)
    for name in ("mix", "adaptive"):
        assert scores[name].nats == pytest.approx(nats[name], abs=TOLERANCE_NATS * num_bytes.max())
    for name in arms:
        found = scores[name]
        assert isinstance(found, TextScores)
        assert found.num_bytes.tolist() == num_bytes.tolist()
        assert found.num_tokens.sum() == num_tokens - 1  # the first is not expected
    assert len({round(found.bits_per_byte, 6) for found in scores.values()}) == 3


async def test_every_byte_is_scored_once_however_windows_are_cut(config: Config) -> None:
    data = "".join(TEXT.texts).encode()
    async with Hosting.open(config) as hosting:
        surface = hosting.surface("mix")
        for window, stride, shift in ((8, None, 0), (24, 5, 0), (16, None, 3), (500, None, 0)):
            windows = cut_text_windows(surface, TEXT, window=window, stride=stride, shift=shift)
            scored = [one.text.encode()[-len(one.documents) :] for one in windows]
            assert b"".join(scored) == data
            owners = np.concatenate([one.documents for one in windows])
            assert np.bincount(owners).tolist() == [len(text.encode()) for text in TEXT.texts]
            assert sum(int(one.num_tokens.sum()) for one in windows) == len(surface.encode(data.decode()))
            for _, after in pairwise(windows):
                assert len(after.text.encode()) > len(after.documents)


async def test_a_text_that_a_member_cannot_read_is_a_reason_not_an_error(config: Config) -> None:
    async with Hosting.open(config) as hosting:
        heard: list[tuple[int, int]] = []
        marked = Documents(("fox <eos> and dogs " + SAMPLE[:200],), is_continuous=True)
        scores = await measure_text(
            hosting, {"a": "mix", "b": "llama"}, marked, window=WINDOW, on_progress=lambda *n: heard.append(n)
        )
    found = scores["a"]
    assert isinstance(found, NotScored)
    assert "'gemma' does not read this text byte for byte" in found.reason
    assert isinstance(scores["b"], TextScores)
    assert heard[-1][0] == heard[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("is_chat", [False, True])
async def test_options_are_chosen_by_the_evidence_of_their_bytes(config: Config, is_chat: bool) -> None:
    """In a chat each member reads its own rendering of it."""
    options, prompt = ("fox", "lazy dogs"), "The quick brown"
    messages = ({"role": "user", "content": prompt},)
    expected = []
    for option in options:
        if is_chat:
            evidence = common_evidence(config, MEMBERS, option, after=messages)
            assert evidence.shape == (2, len(option))
        else:
            evidence = common_evidence(config, MEMBERS, f"{prompt} {option}")[:, -len(option) - 1 :]
        expected.append(pooled("mix", evidence).sum())
    task = Task("t", (Item("a", prompt, ("fox",), options),), "multiple_choice", is_chat=is_chat)
    async with Hosting.open(config) as hosting:
        found = await option_logprobs(hosting, "mix", messages if is_chat else prompt, options)
        (score,) = await measure_task(hosting, "mix", task)
        others = [await option_logprobs(hosting, name, prompt, options) for name in ("product", "contrast")]
    assert found == pytest.approx(expected, abs=0.01)
    assert list(json.loads(score.outputs[0]).values()) == pytest.approx(found, rel=1e-5)
    assert score.answers == (options[int(np.argmax(expected))],)
    assert np.isfinite(others).all()


async def test_weights_follow_the_evidence_and_the_likeliest_bytes_are_known(config: Config) -> None:
    text = "The quick brown"
    async with Hosting.open(config) as hosting:
        scores = await score_bytes(hosting.models["adaptive"], text)
        drawn = await score_bytes(hosting.models["mix"], text)
    evidence = common_evidence(config, MEMBERS, text)
    assert scores.of_members == pytest.approx(evidence, abs=0.01)
    assert scores.weights[:, 0] == pytest.approx([0.5, 0.5])
    assert scores.weights.sum(0) == pytest.approx(1)
    ahead = evidence[0, 0] > evidence[1, 0]
    assert (scores.weights[0, 1] > 0.5) == ahead
    assert drawn.is_likeliest.shape == drawn.logprobs.shape
    assert (drawn.logprobs[drawn.is_likeliest] > -np.log(257)).all()


async def test_the_harness_asks_for_the_likelihood_of_bytes(config: Config, tmp_path: Path) -> None:
    rows = [{"question": "The quick brown", "options": ["fox", "dog jumps"], "label": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, metric in (("tiny_choice", "multiple_choice", "acc"), ("tiny_rolling", None, "bits_per_byte")):
        body = [
            f"task: {name}",
            "dataset_path: json",
            f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}",
            "test_split: test",
            'doc_to_text: "{{question}}"' if kind else 'doc_to_text: ""',
            *(["doc_to_choice: options", "doc_to_target: label"] if kind else ['doc_to_target: "{{question}}"']),
            f"output_type: {kind or 'loglikelihood_rolling'}",
            f"metric_list: [{{metric: {metric}}}]",
        ]
        (tmp_path / f"{name}.yaml").write_text("\n".join(body))
    async with Hosting.open(config) as hosting:
        found = await run_harness(hosting, "mix", ["tiny_choice"], include_path=tmp_path)
        nats = await option_logprobs(hosting, "mix", rows[0]["question"], tuple(rows[0]["options"]))
        (item,) = found["tiny_choice"].items
        assert [json.loads(output)[0] for output in item.outputs] == pytest.approx(nats, rel=1e-4)
        assert item.score == float(nats[1] > nats[0])
        with pytest.raises(UnsupportedError, match="share no token that could stand before a text"):
            await run_harness(hosting, "mix", ["tiny_rolling"], include_path=tmp_path)


def test_the_reference_sums_to_the_probability_of_the_text(config: Config) -> None:
    begins_at, evidence = plain_evidence(config, "gemma", "The")
    assert begins_at == 0  # it has a token that stands before a text
    assert evidence.shape == (3,)
    assert (evidence <= 1e-9).all()
