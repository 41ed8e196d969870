"""The table of docs/scaling-out.md, row by row, and a request that shows for each whether it is true."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "docs" / "scaling-out.md"
COLUMNS = ("transformers", "vllm")


@dataclass(frozen=True)
class Row:
    name: str
    cells: dict[str, str]


def rows(page: str) -> list[Row]:
    """The table between `<!-- features -->` and `<!-- end -->`."""
    table = page.partition("<!-- features -->")[2].partition("<!-- end -->")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if line[:1] == "|"]
    header, _, *body = found
    assert tuple(header[1:]) == tuple(f"`kind: {column}`" for column in COLUMNS), header
    return [Row(name, dict(zip(COLUMNS, cells, strict=True))) for name, *cells in body]


FEATURES = rows(PAGE.read_text(encoding="utf-8"))

CHAT = "/v1/chat/completions"
SAY = {"messages": [{"role": "user", "content": "def f(x): return?"}]}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "streams": (CHAT, SAY | {"stream": True}),
    "several choices, `n`": (CHAT, SAY | {"n": 3}),
    "several equal choices at temperature 0": (CHAT, SAY | {"n": 2, "temperature": 0}),
    "seeds": (CHAT, SAY | {"seed": -1}),
    "stop strings and stop tokens": (CHAT, SAY | {"stop": ["x"], "stop_token_ids": [40]}),
    "penalties, logit bias, top-p, top-k, min-p": (
        CHAT,
        SAY
        | {"presence_penalty": 1, "repetition_penalty": 1.2, "logit_bias": {"40": 5}}
        | {"top_p": 0.9, "top_k": 5, "min_p": 0.01},
    ),
    "temperatures from 0.00001 to below 0.01": (CHAT, SAY | {"temperature": 0.001}),
    "log-probabilities of the mixture": (CHAT, SAY | {"logprobs": True, "top_logprobs": 20}),
    "log-probabilities of the prompt, `echo`": (
        "/v1/completions",
        {"prompt": "To be, or not", "echo": True, "logprobs": 2},
    ),
    "JSON schema, regular expression, choice": (
        CHAT,
        SAY | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    ),
    "forced tool calls": (CHAT, SAY | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}),
    "weights of a request": (CHAT, SAY | {"ensemble": {"weights": {"llama": 1, "deep": 0.5}}}),
    "arithmetic pool": (CHAT, SAY | {"ensemble": {"pool": "arithmetic"}}),
    "geometric pool, negative weights": (
        CHAT,
        SAY | {"ensemble": {"pool": "geometric", "weights": {"llama": 1, "red": 1, "deep": -0.5}}},
    ),
    "posterior pool": (CHAT, SAY | {"ensemble": {"pool": "posterior"}}),
    "posterior pool with a share, weights as in the config": (CHAT, SAY | {"model": "adaptive"}),
    "posterior pool with a share, weights of a request": (
        CHAT,
        SAY | {"model": "adaptive", "ensemble": {"weights": {"llama": 1, "red": 1}}},
    ),
    "each member's view of a token, `explain`": (CHAT, SAY | {"ensemble": {"explain": True}}),
}
