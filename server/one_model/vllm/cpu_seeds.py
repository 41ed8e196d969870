"""Seeds on CPUs: a token that is thrown away must not use up its request's random numbers.

vLLM reads a long prompt in chunks, samples a token after each of them, and throws away all but the last. For requests
with a seed it then takes back the generator's offset, which generators on CPUs do not have: the worker dies of it (vLLM
0.32). Here such rows have no generator of their own while their token is thrown away. GPUs need none of this.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def spare_generators(runner: Any) -> None:
    """Make a V1 model runner leave the generators of rows alone whose token is thrown away."""
    sample_tokens = runner.sample_tokens

    def sample_and_spare(grammar_output: Any) -> Any:
        batch = runner.input_batch
        discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        spared = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
        try:
            return sample_tokens(grammar_output)
        finally:
            batch.generators.update(spared)

    runner.sample_tokens = sample_and_spare
