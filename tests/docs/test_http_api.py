"""docs/http-api.md says what the application's own description and its tables of errors say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from ensemble_server.server.api import json_body
from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.errors import STATUS_KINDS
from ensemble_server.server.config.blocks import ServerConfig
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.engines.scripted_hosting import ScriptedHosting
from ensemble_server.server.metrics import Metrics
from ensemble_server.server.requests import classify_body, generation, messages, protocol, vote
from ensemble_server.server.requests.anthropic_messages.body import MessagesBody
from ensemble_server.server.requests.errors import FINDING_CODES, KINDS, ErrorKind
from ensemble_server.server.requests.openai_responses.body import ResponsesBody

PAGE = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
BODIES: dict[str, type[BaseModel]] = {
    "chats": protocol.ChatBody,
    "completions": protocol.CompletionBody,
    "responses": ResponsesBody,
    "messages": MessagesBody,
}


def rows(mark: str) -> list[list[str]]:
    """The cells of the table between `<!-- mark -->` and `<!-- end -->`, less its head."""
    table = PAGE.partition(f"<!-- {mark} -->")[2].partition("<!-- end -->")[0]
    lines = [line for line in table.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The statuses besides 200 of each route of a server with keys."""
    hosting = ScriptedHosting(
        {"m": ScriptedModel("m", Script(("!",)))}, folder=tmp_path_factory.mktemp("batches"), api_keys=("key",)
    )
    document = create_app(hosting, metrics=Metrics()).openapi()
    return {
        f"`{method.upper()} {path}`": sorted(set(operation["responses"]) - {"200"})
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_is_listed_with_its_refusals(operations: dict[str, list[str]]) -> None:
    listed = {route: statuses.split() for route, _, statuses in rows("routes")}
    assert listed == operations


def test_every_error_is_listed_with_its_status_and_type() -> None:
    invalid = [ErrorKind(400, "invalid_request_error", code) for code in FINDING_CODES.values()]
    known = {(str(kind.status), f"`{kind.code}`", f"`{kind.type}`") for kind in (*KINDS.values(), *invalid)}
    known |= {(str(kind.status), f"`{kind.code}`", f"`{kind.type}`") for kind in STATUS_KINDS.values()}
    listed = [(status, code, kind) for status, code, kind, _ in rows("errors")]
    assert sorted(listed) == sorted(known)


def test_every_extension_is_a_field_where_the_page_says_so() -> None:
    for fields, where, _ in rows("extensions"):
        bodies = list(BODIES) if where == "all" else where.split(", ")
        for name in re.findall(r"`(\w+)`", fields):
            assert [body for body in BODIES if name in BODIES[body].model_fields] == bodies, name


def test_limits_are_those_of_the_code() -> None:
    default = ServerConfig()
    numbers = {what: [int(number) for number in re.findall(r"\d+", limit)] for what, limit in rows("limits")}
    assert numbers == {
        "a body": [default.max_body_bytes, json_body.MAX_VALUES, json_body.MAX_PARAMETERS, 200],
        "requests that wait": [default.max_queue],
        "stored responses": [default.stored_responses_mb],
        "messages, or items of an input": [messages.MAX_MESSAGES],
        "parts of one message": [messages.MAX_PARTS],
        "calls of one message": [messages.MAX_CALLS],
        "tools": [messages.MAX_TOOLS],
        "prompts of one completion": [protocol.MAX_PROMPTS],
        "choices, `n`": [128],
        "`top_logprobs`, `logprobs`, `prompt_logprobs`, `explain.top`": [generation.MAX_EXPLAIN_TOP],
        "stop strings": [64],
        "`stop_token_ids`": [protocol.MAX_STOP_TOKENS],
        "`logit_bias`": [protocol.MAX_BIASES],
        "texts to embed": [protocol.MAX_EMBEDDING_INPUTS],
        "labels to classify": [classify_body.MAX_LABELS],
        "candidates of a vote": [vote.MAX_CANDIDATES, vote.MAX_CHARS],
    }
