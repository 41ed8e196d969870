"""Weights fitted on real tiny models, against weights found without the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from ensemble_server.ensembles.errors import ConfigError, UnknownModelError
from ensemble_server.server.compare.deciding.fitting import WeightFit, check_fittable, fit_weights
from ensemble_server.server.compare.deciding.held_back import fit_and_judge
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.text_measure import measure_text
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from tests.conftest import SAMPLE
from tests.server.compare.different_vocabularies import config_over
from tests.thinned import first_fast

TEXT = Documents(tuple(SAMPLE[start : start + 100] for start in range(0, 600, 100)), is_continuous=True)
WINDOW = 64
MEMBERS = ["llama", "red", "green"]


def config_of(tiny: dict[str, Path], **more):
    models = {
        "llama": {"path": str(tiny["llama"]), "dtype": "float32"},
        "red": {"base": "llama", "adapter": str(tiny["red"])},
        "green": {"base": "llama", "adapter": str(tiny["green"])},
    }
    for pool in ("arithmetic", "geometric", "posterior"):
        members = {"llama": 1, "red": 0, "green": 2} if pool == "arithmetic" else MEMBERS
        models[pool] = {"method": "probability_average", "members": members, "pool": pool}
    return parse_config({"models": models | more}, source=Path("config.yaml"))


def with_weights(tiny, pool: str, weights, share: float = 0.0):
    entry = {"method": "probability_average", "members": dict(weights), "pool": pool}
    return config_of(tiny, found=entry | ({"share": share} if share else {}))


async def bits_of(config, names: list[str]) -> dict[str, float]:
    async with Hosting.open(config) as hosting:
        scores = await measure_text(hosting, {name: name for name in names}, TEXT, window=WINDOW)
    return {name: found.bits_per_byte for name, found in scores.items()}


@pytest.mark.parametrize("pool", ["arithmetic", "geometric", "posterior"])
async def test_a_fitted_pool_costs_no_more_than_before_and_than_any_member_of_it(tiny, pool) -> None:
    heard: list[tuple[int, int]] = []
    async with Hosting.open(config_of(tiny)) as hosting:
        fitted = await fit_weights(
            hosting, pool, [TEXT], window=WINDOW, on_progress=lambda *progress: heard.append(progress)
        )
    assert heard == [(n, len(heard)) for n in range(1, len(heard) + 1)]
    bits = await bits_of(with_weights(tiny, pool, fitted.weights, fitted.share or 0.0), [*MEMBERS, pool, "found"])
    assert bits["found"] <= min(bits.values()) + 1e-4
    if pool != "posterior":
        assert sum(fitted.weights.values()) == pytest.approx(1)
        assert fitted.weights["red"] > 0  # it rests in the config, and is fitted all the same
        assert fitted.nats_per_token * fitted.num_tokens == pytest.approx(
            bits["found"] * np.log(2) * num_scored_bytes(tiny), rel=2e-3
        )


def num_scored_bytes(tiny) -> int:
    from transformers import AutoTokenizer

    text = "".join(TEXT.texts)
    first = AutoTokenizer.from_pretrained(tiny["llama"])(text, return_offsets_mapping=True)["offset_mapping"][0]
    return len(text.encode()) - (first[1] - first[0])


async def test_a_sample_of_positions_bounds_the_memory_and_lies_near_the_whole(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        whole = await fit_weights(hosting, "geometric", [TEXT], window=WINDOW)
        part = await fit_weights(hosting, "geometric", [TEXT], window=WINDOW, sample_bytes=2 * 3 * 320 * 100)
        again = await fit_weights(hosting, "geometric", [TEXT], window=WINDOW, sample_bytes=2 * 3 * 320 * 100)
        other = await fit_weights(hosting, "geometric", [TEXT], window=WINDOW, sample_bytes=2 * 3 * 320 * 100, seed=1)
    assert part.num_tokens == 100 < whole.num_tokens
    assert part == again != other
    assert part.nats_per_token == pytest.approx(whole.nats_per_token, rel=0.2)


async def test_free_weights_may_be_negative(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        free = await fit_weights(hosting, "geometric", [TEXT], window=WINDOW, constraint="free")
        bound = await fit_weights(hosting, "geometric", [TEXT], window=WINDOW)
    assert free.nats_per_token <= bound.nats_per_token + 1e-6
    assert sum(free.weights.values()) != pytest.approx(1, abs=1e-3)


async def test_a_fit_is_judged_on_documents_that_it_has_not_seen(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        judged = await fit_and_judge(hosting, "arithmetic", [TEXT, TEXT], window=WINDOW)
        scores = await measure_text(hosting, {"before": "arithmetic", "red": "red"}, TEXT, window=WINDOW)
    assert (judged.num_fitted, judged.num_held_back) == (6, 6)
    odd = np.tile(scores["before"].nats[1::2], 2)
    np.testing.assert_allclose(judged.before.nats, odd, rtol=1e-5)
    np.testing.assert_allclose(judged.alone["red"].nats, np.tile(scores["red"].nats[1::2], 2), rtol=1e-5)
    assert judged.fitted.num_tokens == 2 * scores["before"].num_tokens[::2].sum()
    assert judged.difference.difference.value == pytest.approx(judged.after.bits_per_byte - judged.before.bits_per_byte)


@pytest.mark.parametrize("pool", ["geometric", "posterior"])
async def test_other_pools_are_judged_as_they_are_served(tiny, pool) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        judged = await fit_and_judge(hosting, pool, [TEXT], window=WINDOW)
        before = (await measure_text(hosting, {"x": pool}, TEXT, window=WINDOW))["x"]
    config = with_weights(tiny, pool, judged.fitted.weights, judged.fitted.share or 0.0)
    async with Hosting.open(config) as hosting:
        after = (await measure_text(hosting, {"x": "found"}, TEXT, window=WINDOW))["x"]
    np.testing.assert_allclose(judged.before.nats, before.nats[1::2], rtol=1e-4)
    np.testing.assert_allclose(judged.after.nats, after.nats[1::2], rtol=1e-4)


async def test_one_document_cannot_be_split(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        with pytest.raises(ConfigError, match="too few documents"):
            await fit_and_judge(hosting, "arithmetic", [Documents(("one text",), True)], window=WINDOW)


async def test_a_window_beyond_the_context_is_refused(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        with pytest.raises(ConfigError, match="holds 512 tokens, the window is 1000"):
            await fit_weights(hosting, "arithmetic", [TEXT], window=1000)


async def test_cancelling_ends_the_reading(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        task = asyncio.ensure_future(fit_weights(hosting, "arithmetic", [TEXT] * 200, window=WINDOW))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        again = await fit_weights(hosting, "arithmetic", [TEXT], window=WINDOW)
    assert again.num_tokens > 0


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("llama", ConfigError, "only a probability_average"),
        ("crowd", ConfigError, "only a probability_average"),
        ("lonely", ConfigError, "one member, 'red'"),
        ("arithmetik", UnknownModelError, "did you mean 'arithmetic'"),
    ],
)
def test_what_cannot_be_fitted_is_said_before_anything_is_loaded(tiny, name, error, message) -> None:
    crowd = {"method": "crowd_vote", "members": ["llama", "red"], "similarity": "rouge_l_word"}
    lonely = {"method": "probability_average", "members": ["red"]}
    with pytest.raises(error, match=message):
        check_fittable(config_of(tiny, crowd=crowd, lonely=lonely), name)


@pytest.mark.parametrize("pool", first_fast(["posterior", "arithmetic", "geometric"]))
async def test_members_of_different_vocabularies_are_weighed_by_their_evidence_for_bytes(tiny, tmp_path, pool) -> None:
    """The members' bits per byte on the same bytes tell which is the better one; the fit goes there."""
    config = config_over(
        tiny,
        tmp_path / "gemma",
        found={"method": "probability_average", "members": ["llama", "gemma"], "pool": pool},
    )
    texts = [Documents(TEXT.texts[:3], is_continuous=True)]
    async with Hosting.open(config) as hosting:
        judged = await fit_and_judge(hosting, "found", texts, window=WINDOW)
        fit = await WeightFit.read(hosting, "found", texts, window=WINDOW)
    fitted = fit.solve()
    assert fitted.unit == judged.fitted.unit == "byte"
    num_bytes = len("".join(texts[0].texts).encode())
    assert num_bytes - 8 < fitted.num_tokens < num_bytes  # all that come behind the first token of llama
    (reading,) = fit.readings
    nats = -sum(part[:, mask].sum(1) for part, mask in zip(reading.logprobs, reading.is_counted, strict=True))
    assert judged.before.num_bytes.tolist() == judged.after.num_bytes.tolist()
    if pool == "posterior":
        assert fitted.share is not None
        return
    best = ("llama", "gemma")[int(np.argmin(nats))]
    assert fitted.weights[best] == max(fitted.weights.values())
    assert fitted.nats_per_token * fitted.num_tokens <= nats.min() * (1 + 1e-3)
