from __future__ import annotations

import json
import re

import pytest

from ensemble_server.ensembles.base import Grammar
from tests.server.api.conftest import CHAT, asgi_client

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


async def post(hosting, path="/v1/chat/completions", **parameters):
    body = CHAT if "chat" in path else {"prompt": "x"}
    async with asgi_client(hosting) as client:
        return await client.post(path, json=body | parameters)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("parameters", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            Grammar("json_schema", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"regex": "[ab]+"}}, Grammar("regex", "[ab]+")),
    ],
)
async def test_what_the_client_wants_arrives_as_a_grammar(host, path, parameters, grammar):
    hosting = host()
    response = await post(hosting, path, **parameters)
    assert response.status_code == 200, response.text
    assert hosting.models["hello"].requests[0].sampling.grammar == grammar


async def test_choices_become_a_regex_of_their_literal_texts(host):
    hosting = host()
    await post(hosting, structured_outputs={"choice": ["yes.", "a|b", "(no)"]})
    source = hosting.models["hello"].requests[0].sampling.grammar.source
    assert [bool(re.fullmatch(source, text)) for text in ("yes.", "a|b", "(no)", "yesx", "a", "")] == [True] * 3 + [
        False
    ] * 3


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}},
            "response_format",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
async def test_a_wrong_grammar_is_a_400_that_names_it(host, parameters, param):
    response = await post(host(), **parameters)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
