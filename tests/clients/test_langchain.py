"""LangChain's ChatOpenAI against the live server."""

from __future__ import annotations

from langchain_openai import ChatOpenAI


def test_invoke_and_stream_give_one_text(live):
    model = ChatOpenAI(model="mix", base_url=f"{live.url}/v1", api_key="none", max_tokens=16, seed=3)
    whole = model.invoke("Hello there")
    assert whole.usage_metadata["output_tokens"] == 16
    assert "".join(chunk.content for chunk in model.stream("Hello there")) == whole.content


def test_the_responses_mode_gives_what_chats_give(live):
    settings = {"model": "mix", "base_url": f"{live.url}/v1", "api_key": "none", "max_tokens": 16}
    seeded = {"extra_body": {"seed": 3}}
    chat = ChatOpenAI(**settings, seed=3).invoke("Hello there")
    model = ChatOpenAI(**settings, use_responses_api=True, **seeded)
    whole = model.invoke("Hello there")
    assert whole.text == chat.text
    assert whole.usage_metadata["output_tokens"] == 16
    streamed = list(model.stream("Hello there"))
    assert "".join(chunk.text for chunk in streamed) == whole.text


def test_the_responses_mode_goes_on_from_what_is_stored(live):
    model = ChatOpenAI(
        model="mix",
        base_url=f"{live.url}/v1",
        api_key="none",
        max_tokens=8,
        use_responses_api=True,
        use_previous_response_id=True,
    )
    first = model.invoke("One?")
    second = model.invoke([("user", "One?"), first, ("user", "Two?")])
    assert second.usage_metadata["output_tokens"] == 8
