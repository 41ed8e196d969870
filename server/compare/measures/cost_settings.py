"""How speed is to be measured: a block of the plan, and what `cost.py` is told."""

from __future__ import annotations

from pydantic import Field

from ensemble_server.server.config.blocks import Block
from ensemble_server.server.config.values import Count, Tokens


class CostSettings(Block):
    """How speed is measured: rounds over all arms in turn, the first of which warms up and is dropped."""

    concurrency: tuple[Count, ...] = Field(default=(1, 16), description="requests at once; none: do not measure speed")
    max_tokens: Tokens = Field(default=32, description="answer tokens per request")
    prompt_tokens: Tokens = Field(default=64, description="length of the prompts, which are cut from the first text")
    repeats: Count = Field(default=3, description="rounds that count")
    kv_tokens: Tokens = Field(default=2048, description="length of the sequence for which the KV cache is stated")
