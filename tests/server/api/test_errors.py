"""Every error has a row in the table, four keys in its object, and little of the client's input in its message."""

from __future__ import annotations

import inspect

import pytest
from openai.types.shared import ErrorObject
from starlette.exceptions import HTTPException

from ensemble_server.ensembles import errors
from ensemble_server.server.api.errors import error_object
from ensemble_server.server.engines.scripted_engine import Script
from ensemble_server.server.requests.errors import KINDS, MAX_MESSAGE_CHARS, kind_of, parameter_path
from tests.server.api.conftest import CHAT, asgi_client

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.EnsembleError)]


@pytest.mark.parametrize("cls", ALL)
def test_every_error_class_has_a_row_of_its_own(cls):
    assert cls in KINDS


def test_a_class_that_somebody_derives_is_answered_like_the_one_above_it():
    class PickyError(errors.ContextLengthError):
        pass

    assert kind_of(PickyError("too long")).code == "context_length_exceeded"


@pytest.mark.parametrize(
    "exc",
    [
        errors.RequestError("wrong", param="n"),
        errors.OverloadedError("full"),
        errors.TurnoutError("crowd", {"a": "slow"}, answered=0, required=1),
        HTTPException(404),
        HTTPException(418),
        KeyError("a secret"),
    ],
)
def test_error_objects_have_all_four_keys_and_openais_types(exc):
    _, error = error_object(exc)
    assert set(error) == {"message", "type", "param", "code"}
    ErrorObject.model_validate(error, strict=True)


def test_an_error_that_is_nobodys_business_says_only_that_the_server_failed():
    kind, error = error_object(RuntimeError("/home/me/weights.bin: password=1234"))
    assert kind.status == 500
    assert "password" not in error["message"]
    assert "weights" not in error["message"]


@pytest.mark.parametrize(
    ("location", "body", "path"),
    [
        (("temperature",), {"temperature": 3}, "temperature"),
        (("messages", 0, "user", "content"), {"messages": [{"content": 1}]}, "messages[0].content"),
        (("messages", 1, "user", "content"), {"messages": [{}, {}]}, "messages[1].content"),
        (("stop", "list[str]", 2), {"stop": ["a", "b", 3]}, "stop[2]"),
        (("messages",), {}, "messages"),
        ((), [], ""),
        (("model",), {"model": 1}, "model"),
    ],
)
def test_parameters_are_named_as_openai_names_them(location, body, path):
    assert parameter_path(location, body) == path


def test_a_branch_that_did_not_fit_is_no_key_of_the_body():
    body = {"stop": {"a": 1}}
    assert parameter_path(("stop", "one"), body, is_missing=False) == "stop"
    assert parameter_path(("stop", "one"), body) == "stop.one"


async def test_routes_that_are_not_there_are_answered_in_openais_shape(host):
    async with asgi_client(host()) as client:
        missing = await client.get("/v1/nothing")
        wrong_method = await client.get("/v1/chat/completions")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"
    assert "GET /v1/nothing" in missing.json()["error"]["message"]
    assert wrong_method.status_code == 405
    assert wrong_method.headers["allow"] == "POST"
    assert set(wrong_method.json()["error"]) == {"message", "type", "param", "code"}


async def test_an_exception_of_no_known_kind_is_a_500_with_a_request_id_and_no_details(host):
    hosting = host(dies=Script(("a",), fails_at=0, error=ZeroDivisionError("the secret")))
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert response.headers["x-request-id"]
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ContextLengthError("too long", param="messages"), 400),
        (errors.UnsupportedError("cannot", param="tools"), 400),
        (errors.MemberError("code", "out of memory"), 502),
        (errors.MemberTimeoutError("code", "stalled"), 504),
        (errors.TurnoutError("crowd", {"a": "slow", "b": "empty"}, answered=0, required=1), 503),
        (errors.DeadlineError("too late"), 504),
        (errors.EngineDeadError("gone"), 503),
    ],
)
async def test_errors_of_models_come_with_their_status_streamed_or_not(host, error, status):
    for stream in (False, True):
        async with asgi_client(host(m=_at_once(error))) as client:
            response = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"]["message"] == str(error)
        assert response.json()["error"]["param"] == getattr(error, "param", None)


async def test_a_full_queue_is_a_429_that_says_when_to_come_back(host):
    async with asgi_client(host(m=_at_once(errors.OverloadedError("full", retry_after_s=2.5)))) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"


async def test_a_large_wrong_body_gets_a_small_answer(host):
    wrong = {"messages": [{"role": "u" * 5000, "content": ["x" * 5000]}] * 500}
    async with asgi_client(host()) as client:
        response = await client.post("/v1/chat/completions", json=wrong)
    assert response.status_code == 400
    assert len(response.content) < 2 * MAX_MESSAGE_CHARS
    assert response.json()["error"]["message"].startswith("messages[0]")  # the first error ends the check


async def test_a_name_chosen_by_the_client_is_repeated_in_part_only(host):
    async with asgi_client(host()) as client:
        unknown = await client.post("/v1/chat/completions", json=CHAT | {"model": "m" * 100_000})
        biased = await client.post("/v1/chat/completions", json=CHAT | {"logit_bias": {"k" * 100_000: 1}})
    assert unknown.status_code == 404
    assert biased.status_code == 400
    assert max(len(unknown.content), len(biased.content)) < 2 * MAX_MESSAGE_CHARS


def _at_once(error: Exception):
    """A model that raises before its first event."""
    from ensemble_server.server.engines.scripted_engine import ScriptedModel

    return ScriptedModel("m", Script((), fails_at=0, error=error))


async def test_a_wrong_method_is_told_all_the_right_ones(host):
    async with asgi_client(host()) as client:
        assert (await client.put("/v1/files")).headers["allow"] == "GET, POST"
        assert (await client.post("/v1/files/file-1")).headers["allow"] == "DELETE, GET"
        assert (await client.get("/v1/vote")).headers["allow"] == "POST"
