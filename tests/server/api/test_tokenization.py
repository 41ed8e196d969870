from __future__ import annotations

import pytest

from ensemble_server.server.engines.scripted_engine import ScriptedModel
from ensemble_server.server.weights.view import Surface
from tests.conftest import make_tokenizer
from tests.server.api.conftest import CHAT, HELLO, asgi_client


async def post(hosting, path, **body):
    async with asgi_client(hosting) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("text", ["", "The quick brown fox", "Ünïcödé 数学 😀", "  two  spaces\n"])
async def test_text_survives_tokenize_and_detokenize(host, surface, text):
    tokens = (await post(host(), "/tokenize", prompt=text, add_special_tokens=False)).json()
    assert tokens == {
        "count": len(surface.encode(text)),
        "max_model_len": 512,
        "tokens": surface.encode(text),
        "token_strs": None,
    }
    assert (await post(host(), "/detokenize", tokens=tokens["tokens"])).json() == {"prompt": text}


async def test_a_conversation_is_tokenized_as_the_model_reads_it(host, surface):
    tokens = (await post(host(), "/tokenize", **CHAT)).json()["tokens"]
    assert tokens == surface.render(CHAT["messages"])
    shorter = (await post(host(), "/tokenize", **CHAT, add_generation_prompt=False)).json()["tokens"]
    assert tokens[: len(shorter)] == shorter
    assert len(shorter) < len(tokens)


async def test_token_strings_are_returned_on_request(host):
    response = await post(host(), "/tokenize", prompt="The", return_token_strs=True)
    assert "".join(response.json()["token_strs"]) == "The"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens[0]"),
    ],
)
async def test_wrong_bodies_are_a_400(host, path, body, param):
    response = await post(host(), path, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_tokenizer_info_has_what_lm_evaluation_harness_reads(host):
    async with asgi_client(host()) as client:
        info = (await client.get("/tokenizer_info")).json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<|im_end|>", "<|endoftext|>", None)
    assert "im_start" in info["chat_template"]


async def test_no_model_need_be_named_where_all_share_a_vocabulary(host):
    assert (await post(host(a=HELLO, b=HELLO), "/tokenize", prompt="x")).status_code == 200


async def test_a_model_must_be_named_where_vocabularies_differ(host, tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path, extra=("<extra>",))
    hosting = host(a=HELLO, b=HELLO)
    hosting._surfaces["b"] = Surface(AutoTokenizer.from_pretrained(tmp_path))
    response = await post(hosting, "/tokenize", prompt="<extra>")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert (await post(hosting, "/tokenize", prompt="<extra>", model="b")).json()["count"] == 1


async def test_a_model_that_is_not_hosted_here_has_no_tokenizer(host):
    hosting = host(far=ScriptedModel("far", HELLO))
    hosting._surfaces = {}
    for body in ({"prompt": "x"}, {"prompt": "x", "model": "far"}):
        response = await post(hosting, "/tokenize", **body)
        assert response.status_code == 400
        assert "hosted here" in response.json()["error"]["message"]
