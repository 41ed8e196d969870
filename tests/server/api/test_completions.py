"""POST /v1/completions: all shapes of prompts, echoes, and the scores that lm-evaluation-harness slices."""

from __future__ import annotations

import asyncio
import math

import orjson
import pytest
from openai.types import Completion
from pydantic import TypeAdapter

from ensemble_server.ensembles.base import Done, MemberUsage, PromptScored, TokenLogprob, Usage
from ensemble_server.server.engines.scripted_engine import LOGPROB, Script, ScriptedModel
from ensemble_server.server.requests import responses
from ensemble_server.server.requests.logprobs import TextOffsets, completion_logprobs
from tests.server.api.conftest import asgi_client, events_of

OURS = TypeAdapter(responses.Completion)


async def post(hosting, **body):
    async with asgi_client(hosting) as client:
        return await client.post("/v1/completions", json={"prompt": "Once"} | body)


async def complete(hosting, **body):
    response = await post(hosting, **body)
    assert response.status_code == 200, response.text
    OURS.validate_json(response.content)
    answer = response.json()
    if not body.get("echo"):  # OpenAI's own types do not know the null that its API puts before the first token
        Completion.model_validate(answer, strict=True)
    return answer


async def chunks(hosting, **body):
    response = await post(hosting, **body, stream=True)
    assert response.status_code == 200, response.text
    *events, end = events_of(response.text)
    assert end == "[DONE]"
    return [orjson.loads(event) for event in events]


async def test_an_answer_is_a_text_completion(host):
    answer = await complete(host())
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["ensemble"]["members"] == ["hello"]


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("Once", ["Once"]),
        (["Once"], ["Once"]),
        (["Once", "Twice"], ["Once", "Twice"]),
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        (["Once", [5, 6]], ["Once", (5, 6)]),
        ("", [""]),
    ],
)
async def test_every_shape_of_prompt_is_read(host, prompt, read):
    hosting = host()
    answer = await complete(hosting, prompt=prompt)
    assert sorted(map(repr, (request.prompt for request in hosting.models["hello"].requests))) == sorted(
        map(repr, read)
    )
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(read)))


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], [True], [1.5], [[1], "a", 2], [[[1]]], {"a": 1}, [-1], [2**40], [320], ["a"] * 1025]
)
async def test_other_shapes_and_ids_outside_the_vocabulary_are_a_400(host, prompt):
    response = await post(host(), prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


async def test_choice_i_of_prompt_p_has_index_p_times_n_plus_i(host):
    answer = await complete(
        host(m=lambda request, index: Script((f"{request.prompt}{index}",))), prompt=["a", "b"], n=2
    )
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a0"),
        (1, "a1"),
        (2, "b0"),
        (3, "b1"),
    ]
    assert answer["usage"]["completion_tokens"] == 4


async def test_prompts_run_at_the_same_time_but_no_more_than_fit_the_engine(host):
    class Counting(ScriptedModel):
        most = 0

        async def generate(self, request):
            async for event in super().generate(request):
                self.most = max(self.most, self.num_live)
                yield event

    model = Counting("m", Script(("a",), delay_s=0.005))
    hosting = host(m=model)
    hosting.config = hosting.config.model_copy(
        update={"engine": hosting.config.engine.model_copy(update={"max_batch": 8})}
    )
    answer = await complete(hosting, prompt=["a"] * 40)
    assert len(answer["choices"]) == 40
    assert model.most == 8
    await complete(hosting, prompt=["a"] * 40, n=4)
    assert model.num_live == 0


async def test_one_prompts_error_ends_the_others(host):
    def script(request, index):
        return Script(("x",), fails_at=0) if request.prompt == "bad" else Script(("x",), stalls_at=0)

    hosting = host(m=script)
    response = await post(hosting, prompt=["good", "bad", "good"])
    assert response.status_code == 502
    assert hosting.models["m"].num_live == 0


async def test_an_echo_stands_before_the_text(host):
    answer = await complete(host(), prompt=["Once", [40, 41]], echo=True)
    assert answer["choices"][0]["text"] == "OnceHello world"
    assert answer["choices"][1]["text"].endswith("Hello world")
    assert len(answer["choices"][1]["text"]) > len("Hello world")


async def test_echo_with_one_token_scores_the_prompt_and_that_token(host, surface):
    """lm-evaluation-harness slices [ctxlen:-1] of these lists, so there must be exactly one entry more than tokens."""
    ids = surface.encode("The quick brown fox")
    answer = await complete(host(), prompt=[ids], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    logprobs = answer["choices"][0]["logprobs"]
    assert {len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {len(ids) + 1}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for logprob, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert logprob == max(top.values())
    assert "".join(logprobs["tokens"]) == answer["choices"][0]["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert answer["choices"][0]["text"][offset:].startswith(token)


async def test_echo_with_no_tokens_scores_the_prompt_alone(host, surface):
    answer = await complete(host(), prompt="The quick", echo=True, max_tokens=0, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "The quick"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(surface.encode("The quick"))
    assert answer["usage"]["completion_tokens"] == 0


async def test_no_tokens_without_echo_is_a_400(host):
    assert (await post(host(), max_tokens=0)).json()["error"]["param"] == "max_tokens"


async def test_the_model_is_asked_to_score_prompts_only_where_they_are_echoed_with_logprobs(host):
    hosting = host()
    await complete(hosting, logprobs=2)
    await complete(hosting, logprobs=2, echo=True)
    await complete(hosting, echo=True)
    asked = [(request.top_logprobs, request.prompt_logprobs) for request in hosting.models["hello"].requests]
    assert asked == [(2, None), (2, 2), (None, None)]


async def test_logprobs_stand_in_parallel_lists(host):
    logprobs = (await complete(host(), logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hel", "lo", " wor", "ld"]
    assert logprobs["token_logprobs"] == [LOGPROB] * 4
    assert logprobs["top_logprobs"][0] == {"Hel": LOGPROB, "Hel1": 2 * LOGPROB}
    assert logprobs["text_offset"] == [0, 3, 5, 9]
    assert "content" not in logprobs


async def test_explain_adds_the_members_views(host):
    logprobs = (await complete(host(), ensemble={"explain": True}))["choices"][0]["logprobs"]
    assert logprobs["content"][0]["members"] == {"hello": {"logprob": LOGPROB, "weight": 1.0}}


@pytest.mark.parametrize("logprobs", [-1, 21, True, "1"])
async def test_logprobs_are_0_to_20(host, logprobs):
    assert (await post(host(), logprobs=logprobs)).status_code == 400


def token(token_id: int, raw: bytes, logprob: float, *top: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id, raw.decode(errors="replace"), raw, logprob, top)


def test_tokens_that_look_alike_do_not_hide_each_other():
    """The largest value must be the likeliest token's: whether a token was the greedy choice is read from it."""
    chosen, likelier = token(7, b"a", -2.0), token(8, b"a", -0.5)
    listed = completion_logprobs([token(7, b"a", -2.0, likelier, chosen)], TextOffsets(), explain=False)
    assert listed["top_logprobs"] == [{"a": -2.0, "token_id:8": -0.5}]


def test_parts_of_characters_are_written_as_bytes():
    listed = completion_logprobs(
        [token(1, b"\xe2\x82", -1.0, token(2, b"\xe2\x83", -0.5))], TextOffsets(), explain=False
    )
    assert listed["tokens"] == ["bytes:\\xe2\\x82"]
    assert listed["top_logprobs"] == [{"bytes:\\xe2\\x82": -1.0, "bytes:\\xe2\\x83": -0.5}]


def test_the_chosen_token_is_listed_even_if_it_is_not_among_the_likeliest():
    listed = completion_logprobs([token(1, b"x", -9.0, token(2, b"y", -0.1))], TextOffsets(), explain=False)
    assert listed["top_logprobs"] == [{"x": -9.0, "y": -0.1}]


def test_impossible_tokens_have_a_number_that_json_knows():
    listed = completion_logprobs([token(1, b"x", -math.inf)], TextOffsets(), explain=False)
    assert listed["token_logprobs"] == [-9999.0]


async def test_text_is_encoded_without_special_tokens_on_request(host, surface):
    hosting = host()
    await complete(hosting, prompt="Once", add_special_tokens=False)
    assert hosting.models["hello"].requests[0].prompt == tuple(surface.encode("Once", add_special_tokens=False))


async def test_token_ids_are_returned_on_request(host, surface):
    answer = await complete(host(), prompt=[40, 41], return_token_ids=True, prompt_logprobs=0)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == [40, 41]
    assert len(choice["token_ids"]) == 4
    assert choice["prompt_logprobs"][0] is None
    assert list(choice["prompt_logprobs"][1]) == ["41"]


async def test_a_model_without_a_tokenizer_here_echoes_texts_but_no_ids(host):
    hosting = host(far=ScriptedModel("far", Script(("!",))), surface=None)
    hosting._surfaces = {}
    assert (await complete(hosting, prompt="Once", echo=True))["choices"][0]["text"] == "Once!"
    assert (await post(hosting, prompt=[1, 2], echo=True)).json()["error"]["param"] == "echo"
    assert (await post(hosting, add_special_tokens=False)).json()["error"]["param"] == "add_special_tokens"


# --- streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [{}, {"echo": True}, {"echo": True, "logprobs": 1}, {"logprobs": 0}, {"max_tokens": 2}]
)
async def test_a_stream_adds_up_to_the_whole_answer(host, body):
    prompts = {"prompt": ["Once", "Twice"], "n": 2}
    whole = await complete(host(), **prompts, **body)
    texts, finishes, logprobs = {}, {}, {}
    for chunk in await chunks(host(), **prompts, **body):
        [choice] = chunk["choices"]
        index = choice["index"]
        texts[index] = texts.get(index, "") + choice["text"]
        finishes[index] = choice["finish_reason"]
        for key, values in (choice["logprobs"] or {}).items():
            logprobs.setdefault(index, {}).setdefault(key, []).extend(values)
    for choice in whole["choices"]:
        assert texts[choice["index"]] == choice["text"]
        assert finishes[choice["index"]] == choice["finish_reason"]
        assert logprobs.get(choice["index"]) == choice["logprobs"]


async def test_usage_of_all_prompts_comes_last(host):
    *before, last = await chunks(host(), prompt=["a", "b"], stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in before)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert last["ensemble"]["usage"]["hello"]["completion_tokens"] == 8


async def test_the_last_finish_of_all_prompts_says_who_answered(host):
    *before, last = await chunks(host(), prompt=["a", "b"])
    assert last["choices"][0]["finish_reason"] == "stop"
    assert "ensemble" in last
    assert not any("ensemble" in chunk for chunk in before)


async def test_several_prompts_have_one_trace_each(host):
    class Traced:
        name, members, max_model_len = "m", ("m",), None
        explains_tokens, fan_out = True, 1

        async def generate(self, request):
            yield PromptScored((1,))
            async for event in ScriptedModel("m", Script(("x",))).generate(request):
                if isinstance(event, Done):
                    event = Done(
                        Usage(1, 1, {"m": MemberUsage(1, 1)}),
                        "vote",
                        ("m",),
                        turnout=len(request.prompt),
                        trace={"prompt": request.prompt},
                    )
                yield event
                await asyncio.sleep(0)

    answer = await complete(host(m=Traced()), prompt=["aa", "b"])
    assert answer["ensemble"]["trace"] == [{"prompt": "aa"}, {"prompt": "b"}]
    assert answer["ensemble"]["turnout"] == 1
    assert answer["ensemble"]["usage"] == {"m": {"prompt_tokens": 2, "completion_tokens": 2}}
