"""Parameters: honoured within their ranges, refused by name, ignored with a word about it."""

from __future__ import annotations

import pytest

from ensemble_server.server.api.json_response import ignored_header
from ensemble_server.server.requests.protocol import IGNORED, REFUSED, ChatBody, CompletionBody
from tests.server.api.conftest import CHAT, asgi_client

COMPLETION = {"prompt": "Once"}


async def chat(hosting, **parameters):
    async with asgi_client(hosting) as client:
        return await client.post("/v1/chat/completions", json=CHAT | parameters)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0, 1, 2, 0.5], [-0.1, 2.1, "1", True, []]),
        ("top_p", [0, 0.1, 1], [-1, 1.1]),
        ("top_k", [-1, 0, 50], [-2, 1.5]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("n", [1, 2], [0, -1, 129, 1.5]),
        ("max_tokens", [1, 100, -1], [0, -2, 1.5, "3"]),
        ("max_completion_tokens", [1, -1], [0]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("repetition_penalty", [0.5, 1, 2], [0, -1]),
        ("seed", [0, -1, 2**63 - 1, -(2**63)], [2**63, 1.5, "1"]),
        ("stop", ["a", ["a", "b"], [], ["a"] * 5, "", ["", "\n"]], [1, [1], ["a"] * 100]),
        ("stop_token_ids", [[], [1, 2]], [[-1], ["a"], 1]),
        ("logit_bias", [{}, {"5": 1.5}, {"0": -100}], [{"a": 1}, {"5": 101}, {"-1": 1}, {"999999": 1}, {"5": "1"}, []]),
        ("logprobs", [True, False], [1, "true"]),
        ("min_tokens", [0, 1], [-1]),
        ("stream", [False], ["yes", 1]),
        (
            "ensemble",
            [{}, {"explain": True}, {"explain": {}}, {"explain": {"top": 20}}],
            [
                [],
                "x",
                {"explain": "yes"},
                {"explain": 1},
                {"explain": {"top": 21}},
                {"explain": {"tops": 1}},
                {"explain": {"top": True}},
            ],
        ),
        ("truncate_prompt_tokens", [1, -1], [0, -2]),
    ],
)
async def test_values_within_a_range_are_taken_and_others_are_a_400_that_names_the_parameter(host, name, good, bad):
    for value in [*good, None]:
        assert (await chat(host(), **{name: value})).status_code == 200, value
    for value in bad:
        response = await chat(host(), **{name: value})
        assert response.status_code == 400, value
        assert response.json()["error"]["param"].startswith(name)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "alien", "content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": "hi"}, "messages"),
    ],
)
async def test_parameters_that_do_not_go_together_are_a_400(host, parameters, param):
    response = await chat(host(), **parameters)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_missing_parameter_is_named(host):
    async with asgi_client(host()) as client:
        response = await client.post("/v1/chat/completions", json={"model": "hello"})
    assert response.json()["error"] == {
        "message": "messages: Field required",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "missing_required_parameter",
    }


@pytest.mark.parametrize("name", sorted(REFUSED))
async def test_what_cannot_be_honoured_is_refused_by_name_and_harmless_values_are_not(host, name):
    neutral, reason = REFUSED[name]
    response = await chat(host(), **{name: {"something": "else"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert response.json()["error"]["code"] == "unsupported_parameter"
    assert reason in response.json()["error"]["message"]
    for value in (None, *neutral):
        response = await chat(host(), **{name: value})
        assert response.status_code == 200
        assert "x-ignored-parameters" not in response.headers


async def test_true_is_no_one(host):
    assert (await chat(host(), best_of=True)).status_code == 400


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}, {"type": "file"}]
)
async def test_parts_that_are_not_text_are_refused_by_name(host, part):
    response = await chat(host(), messages=[{"role": "user", "content": [{"type": "text", "text": "see"}, part]}])
    assert response.status_code == 400
    assert part["type"] in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "messages[0].content[1]"


@pytest.mark.parametrize("name", sorted(IGNORED))
async def test_parameters_that_change_nothing_are_accepted_in_silence(host, name):
    response = await chat(host({"strict_params": True}), **{name: "anything"})
    assert response.status_code == 200
    assert "x-ignored-parameters" not in response.headers


async def test_unknown_parameters_are_ignored_and_the_client_is_told(host, caplog):
    hosting = host()
    async with asgi_client(hosting) as client:
        for _ in range(2):
            response = await client.post("/v1/chat/completions", json=CHAT | {"temprature": 1, "ä\r\nx: y": 2})
    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"] == "temprature, %C3%A4%0D%0Ax%3A%20y"
    warnings = [record for record in caplog.records if "temprature" in record.getMessage()]
    assert len(warnings) == 1


async def test_unknown_parameters_are_told_in_streams_too(host):
    response = await chat(host(), stream=True, temprature=1)
    assert response.headers["x-ignored-parameters"] == "temprature"


async def test_strict_params_refuses_unknown_parameters_with_the_nearest_name(host):
    response = await chat(host({"strict_params": True}), temprature=1)
    assert response.status_code == 400
    assert "did you mean 'temperature'?" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "temprature"


def test_max_completion_tokens_wins_over_max_tokens():
    assert ChatBody(**CHAT, max_tokens=5, max_completion_tokens=7).max_new_tokens == 7
    assert ChatBody(**CHAT, max_tokens=5).max_new_tokens == 5
    assert ChatBody(**CHAT).max_new_tokens is None


def test_completions_write_16_tokens_unless_told_otherwise():
    assert CompletionBody(**COMPLETION).max_new_tokens == 16
    assert CompletionBody(**COMPLETION, max_tokens=3).max_new_tokens == 3


async def test_sampling_arrives_at_the_model_as_it_was_asked_for(host):
    hosting = host()
    await chat(
        hosting,
        max_tokens=3,
        temperature=0.25,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"5": -1},
        seed=-7,
        stop="END",
        stop_token_ids=[9],
        include_stop_str_in_output=True,
        min_tokens=2,
        ignore_eos=True,
        skip_special_tokens=False,
        n=2,
        truncate_prompt_tokens=8,
    )
    [request] = hosting.models["hello"].requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.25, 0.5, 0)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 1, -1)
    assert (sampling.repetition_penalty, sampling.logit_bias, sampling.seed) == (1.5, {5: -1}, -7)
    assert (sampling.stop, sampling.stop_token_ids, sampling.include_stop_str_in_output) == (("END",), (9,), True)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.skip_special_tokens) == (2, True, False)
    assert (request.n, request.truncate_prompt_tokens) == (2, 8)


async def test_parameters_left_out_or_null_have_openais_defaults(host):
    hosting = host()
    await chat(hosting)
    await chat(hosting, temperature=None, top_p=None, n=None, stop=None, seed=None, logit_bias=None, stream=None)
    left_out, null = hosting.models["hello"].requests
    assert left_out.sampling == null.sampling
    assert (left_out.sampling.temperature, left_out.sampling.top_p, left_out.n) == (1.0, 1.0, 1)
    assert left_out.top_logprobs is None


async def test_the_ensemble_object_arrives_as_overrides_and_explain(host):
    hosting = host()
    await chat(hosting, ensemble={"explain": True, "weights": {"a": 1}, "pool": "geometric"})
    [request] = hosting.models["hello"].requests
    assert request.explain
    assert request.overrides == {"weights": {"a": 1}, "pool": "geometric"}
    assert request.top_logprobs == 0  # explained tokens need a place to stand


async def test_minus_one_keeps_as_much_of_the_prompt_as_leaves_room_for_the_answer(host):
    hosting = host()
    await chat(hosting, truncate_prompt_tokens=-1, max_tokens=12)
    [request] = hosting.models["hello"].requests
    assert request.truncate_prompt_tokens == 500  # of 512


def test_the_header_of_ignored_names_stays_a_legal_header():
    header = ignored_header(["", "a b", "ü\r\nx: y"])["x-ignored-parameters"]
    assert header == '"", a%20b, %C3%BC%0D%0Ax%3A%20y'
