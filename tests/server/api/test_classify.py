"""POST /v1/classify over HTTP; what it computes is tested in tests/server/requests/test_classify.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from pydantic import TypeAdapter

from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.requests.responses import ClassificationObject
from tests.server.api.conftest import asgi_client

pytestmark = pytest.mark.asyncio(loop_scope="module")
ASKED = {"prompt": "The quick brown fox is", "labels": ["good", "bad", "a question"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosting(tiny: dict[str, Path]) -> AsyncIterator[Hosting]:
    models = {
        "base": {"path": str(tiny["llama"])},
        "red": {"base": "base", "adapter": str(tiny["red"])},
        "crowd": {"method": "crowd_vote", "members": ["base", "red"]},
    }
    config = parse_config({"models": models, "engine": {"max_context": 128}}, source=Path("/config.yaml"))
    async with Hosting.open(config) as hosting:
        yield hosting


async def test_labels_get_probabilities_that_sum_to_one_and_the_answer_has_its_shape(hosting):
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/classify", json=ASKED | {"model": "crowd"})
    assert response.status_code == 200, response.text
    shown = response.json()
    TypeAdapter(ClassificationObject).validate_python(shown)
    assert sum(shown["probabilities"].values()) == pytest.approx(1)
    assert shown["label"] == max(shown["probabilities"], key=shown["probabilities"].get)
    assert set(shown["members"]) == {"base", "red"}


async def test_tokens_are_counted_in_the_log_and_the_metrics(hosting, caplog):
    caplog.set_level("INFO", logger="ensemble.access")
    async with asgi_client(hosting) as client:
        shown = (await client.post("/v1/classify", json=ASKED | {"model": "base"})).json()
        counted = (await client.get("/metrics")).text
    [record] = [record for record in caplog.records if "/v1/classify" in record.message]
    assert record.fields["model"] == "base"
    assert record.fields["prompt_tokens"] == shown["usage"]["prompt_tokens"] > 0
    assert f'prompt_tokens_total{{model="base"}} {float(shown["usage"]["prompt_tokens"])}' in counted


async def test_a_content_free_prompt_is_read_once_for_all_requests_of_a_server(hosting):
    free = {"prompt": "The N/A is"}
    async with asgi_client(hosting) as client:
        first = (await client.post("/v1/classify", json=ASKED | {"model": "base", "content_free": free})).json()
        again = (await client.post("/v1/classify", json=ASKED | {"model": "base", "content_free": free})).json()
        assert len(client.app.state.context.priors) == 1
    assert first["probabilities"] == pytest.approx(again["probabilities"], rel=1e-4)


async def test_what_is_not_known_is_ignored_aloud_or_refused_where_it_would_mislead(hosting):
    async with asgi_client(hosting) as client:
        lenient = await client.post("/v1/classify", json=ASKED | {"model": "base", "lables": []})
        misleading = await client.post(
            "/v1/classify", json=ASKED | {"model": "base", "content_free": {"prompt": "x", "promt": "y"}}
        )
    assert (lenient.status_code, lenient.headers["x-ignored-parameters"]) == (200, "lables")
    assert misleading.status_code == 400
    assert misleading.json()["error"]["code"] == "unknown_parameter"
    assert "did you mean 'prompt'" in misleading.json()["error"]["message"]
