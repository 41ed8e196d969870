"""Thoughts over HTTP: apart from the answer, counted, bounded, and told to the template. Over a tiny real model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.conftest import CHAT_TEMPLATE
from tests.server.api.houses import House, open_house

pytestmark = pytest.mark.asyncio(loop_scope="module")

# As Qwen3's: thoughts are on unless they are switched off, and then the template closes them at once.
THINKING = CHAT_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}{% endif %}",
)
ASK = {"messages": [{"role": "user", "content": "Why?"}], "temperature": 0, "max_tokens": 40, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    models = {
        "plain": {"path": str(tiny["llama"])},
        "thinker": {"base": "plain", "chat_template": THINKING},
        "quiet": {"base": "plain", "chat_template": THINKING, "chat_template_kwargs": {"enable_thinking": False}},
        "adaptive": {"method": "probability_average", "members": ["thinker", "plain"], "pool": "posterior"},
        "spelt": {"method": "probability_average", "members": ["thinker", "plain"], "vocabulary": "bytes"},
        "late": {"method": "probability_average", "members": ["plain", "thinker"], "vocabulary": "bytes"},
        "wordy": {"base": "plain", "chat_template": CHAT_TEMPLATE + "<think>\n"},  # as R1's: it has no switch
        "vote": {"method": "majority", "members": ["thinker"], "samples": 2},
    }
    async with open_house("transformers", models, tmp_path_factory.mktemp("thoughts"), body=ASK) as house:
        yield house


async def streamed(house: House, **body: object) -> tuple[str, str, dict]:
    """(answer, thought, usage)"""
    answer = thought = ""
    usage = {}
    asked = ASK | {"stream": True, "stream_options": {"include_usage": True}} | body
    async with house.client.stream("POST", "/v1/chat/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    answer += choice["delta"].get("content") or ""
                    thought += choice["delta"].get("reasoning_content") or ""
    return answer, thought, usage


@pytest.mark.parametrize("model", ["thinker", "adaptive"])
@pytest.mark.parametrize("limit", ["max_reasoning_tokens", "thinking_token_budget"])
async def test_a_thought_ends_when_its_tokens_are_used(house: House, model: str, limit: str) -> None:
    answer = await house.chat(model, **{limit: 5})
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"].strip() and message["content"].strip()
    assert "</think>" not in message["content"] + message["reasoning_content"]
    details = answer["usage"]["completion_tokens_details"]
    end = len(house.hosting.surface("thinker").encode("</think>", add_special_tokens=False))
    assert details == {"reasoning_tokens": 5 + end}
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["ensemble"]["usage"]["thinker"]["reasoning_tokens"] == 5 + end


async def test_streamed_thoughts_are_the_same_thoughts(house: House) -> None:
    whole = await house.chat("thinker", max_reasoning_tokens=5)
    message = whole["choices"][0]["message"]
    answer, thought, usage = await streamed(house, model="thinker", max_reasoning_tokens=5)
    assert (answer, thought, usage) == (message["content"], message["reasoning_content"], whole["usage"])


async def test_without_a_limit_a_thought_may_take_all(house: House) -> None:
    answer = await house.chat("thinker")
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 40}


async def test_a_limit_of_zero_closes_the_thought_at_once(house: House) -> None:
    message = (await house.chat("thinker", max_reasoning_tokens=0))["choices"][0]["message"]
    assert message["content"].strip() and "reasoning_content" not in message


async def test_models_that_do_not_think_have_no_thoughts_to_count(house: House) -> None:
    answer = await house.chat("plain", max_reasoning_tokens=5)
    assert "completion_tokens_details" not in answer["usage"]
    assert "reasoning_content" not in answer["choices"][0]["message"]


@pytest.mark.parametrize(
    "told", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}, {"model": "quiet"}]
)
async def test_a_template_that_can_is_told_not_to_think(house: House, told: dict) -> None:
    answer = await house.chat(**{"model": "thinker"} | told)
    assert "reasoning_content" not in answer["choices"][0]["message"]
    on = {"chat_template_kwargs": {"enable_thinking": True}, "max_reasoning_tokens": 3}
    assert (await house.chat(**{"model": told.get("model", "thinker")} | on))["choices"][0]["message"][
        "reasoning_content"
    ]


async def test_a_level_of_effort_reaches_a_template_that_knows_levels(house: House) -> None:
    low, high = [await house.chat("thinker", reasoning_effort=level, max_tokens=1) for level in ("low", "high")]
    assert low["usage"]["prompt_tokens"] != high["usage"]["prompt_tokens"] or low["choices"] != high["choices"]
    await house.chat("vote", reasoning_effort="low", temperature=1)
    assert (await house.chat("plain", reasoning_effort="none"))["choices"][0]["message"]["content"]


async def test_every_sample_of_a_vote_has_its_own_limit(house: House) -> None:
    answer = await house.chat(
        "vote", max_reasoning_tokens=4, temperature=1, seed=1, ensemble={"early_stop": False}
    )  # the first sample decides a vote of two
    end = len(house.hosting.surface("thinker").encode("</think>", add_special_tokens=False))
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 * (4 + end)


async def post(house: House, path: str, **body: object) -> httpx.Response:
    """The question of `ASK`, as the protocol at `path` asks it."""
    asked = dict(ASK)
    if path == "/v1/responses":
        asked |= {"input": asked.pop("messages"), "max_output_tokens": asked.pop("max_tokens")}
    return await house.client.post(path, json=asked | body)


THOUGHTS = {
    "/v1/chat/completions": {
        "low": {"reasoning_effort": "low"},
        "none": {"reasoning_effort": "none"},
        "off": {"thinking": {"type": "disabled"}},
        "limit": {"thinking": {"type": "enabled", "budget_tokens": 5}},
    },
    "/v1/responses": {
        "low": {"reasoning": {"effort": "low"}},
        "none": {"reasoning": {"effort": "none"}},
        "limit": {"max_reasoning_tokens": 5},
    },
    "/v1/messages": {
        "low": {"output_config": {"effort": "low"}},
        "none": {"output_config": {"effort": "none"}},
        "off": {"thinking": {"type": "disabled"}},
        "limit": {"thinking": {"type": "enabled", "budget_tokens": 5}},
    },
}


def thought_and_answer(path: str, answer: dict) -> tuple[str, str]:
    match path.rpartition("/")[2]:
        case "completions":
            message = answer["choices"][0]["message"]
            return message.get("reasoning_content") or "", message["content"]
        case "responses":
            *thoughts, said = answer["output"]
            return "".join(part["text"] for item in thoughts for part in item["content"]), said["content"][0]["text"]
    *thoughts, said = answer["content"]
    return "".join(block["thinking"] for block in thoughts), said["text"]


@pytest.mark.parametrize("path", THOUGHTS)
async def test_all_protocols_say_the_same_about_thoughts(house: House, path: str) -> None:
    """The answers are those of a chat that says it in the words of this server."""
    same = {
        "low": {"chat_template_kwargs": {"reasoning_effort": "low"}, "max_reasoning_tokens": 5},
        "none": {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "none"}},
        "off": {"chat_template_kwargs": {"enable_thinking": False}},
        "limit": {"max_reasoning_tokens": 5},
    }
    for wish, said in THOUGHTS[path].items():
        bounded = said | ({"max_reasoning_tokens": 5} if wish == "low" else {})
        response = await post(house, path, model="thinker", **bounded)
        assert response.status_code == 200, response.text
        assert "x-ignored-parameters" not in response.headers
        thought, text = thought_and_answer(path, response.json())
        wanted = (await house.chat("thinker", **same[wish]))["choices"][0]["message"]
        assert (thought, text) == (wanted.get("reasoning_content", ""), wanted["content"])


@pytest.mark.parametrize("path", THOUGHTS)
async def test_thoughts_without_a_switch_are_closed_at_once(house: House, path: str) -> None:
    for wish in THOUGHTS[path].keys() & {"none", "off"}:
        response = await post(house, path, model="wordy", **THOUGHTS[path][wish])
        assert response.status_code == 200, response.text
        thought, text = thought_and_answer(path, response.json())
        assert not thought and text.strip()


async def test_what_nobody_can_be_told_is_named_in_all_protocols(house: House) -> None:
    """Clients send it to every model. `late`: its first member does not think, and its thoughts cannot be ended."""
    enabled = {"thinking": {"type": "enabled", "budget_tokens": 5}}
    for path, model, said, named in (
        ("/v1/chat/completions", "plain", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("/v1/chat/completions", "plain", enabled, "thinking"),
        ("/v1/chat/completions", "late", enabled, "thinking, thinking.budget_tokens"),
        ("/v1/messages", "plain", enabled, "thinking"),
        ("/v1/messages", "late", {"output_config": {"effort": "low"}}, "output_config.effort"),
        ("/v1/responses", "plain", {"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ):
        response = await post(house, path, model=model, **said)
        assert (response.status_code, response.headers["x-ignored-parameters"]) == (200, named), (path, said)
    response = await post(house, "/v1/messages", model="plain", thinking={"type": "disabled"})
    assert response.status_code == 200 and "x-ignored-parameters" not in response.headers
    response = await post(house, "/v1/messages", thinking={"type": "enabled", "budget_tokens": -1})
    assert (response.status_code, response.json()["error"]["details"]["param"]) == (400, "thinking.budget_tokens")


@pytest.mark.parametrize("limit", [0, 5])
async def test_averages_over_text_end_a_thought_when_its_pieces_are_used(house: House, limit: int) -> None:
    answer = await house.chat("spelt", max_reasoning_tokens=limit)
    message = answer["choices"][0]["message"]
    assert bool(message.get("reasoning_content", "").strip()) is (limit > 0) and message["content"].strip()
    assert "think>" not in message["content"] + message.get("reasoning_content", "")
    num_thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert limit < num_thought <= limit + len("</think>") + 2  # pieces are told when they have settled
    assert await streamed(house, model="spelt", max_reasoning_tokens=limit) == (
        message["content"],
        message.get("reasoning_content", ""),
        answer["usage"],
    )


async def test_averages_over_text_refuse_a_limit_where_the_first_member_does_not_think(house: House) -> None:
    response = await house.client.post("/v1/chat/completions", json=ASK | {"model": "late", "max_reasoning_tokens": 4})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_reasoning_tokens")
    assert "'plain' does not think" in response.json()["error"]["message"]


async def test_chat_template_kwargs_may_not_say_what_the_server_says(house: House) -> None:
    body = ASK | {"model": "plain", "chat_template_kwargs": {"tokenize": False}}
    response = await house.client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")
