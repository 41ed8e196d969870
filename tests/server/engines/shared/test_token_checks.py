"""Token ids from outside."""

from __future__ import annotations

import pytest

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.engines.shared.token_checks import check_ids, check_prompt


def test_the_first_and_the_last_token_of_a_vocabulary_are_in_it() -> None:
    check_prompt([0, 9], 10, "prompt")
    check_ids({}, 10, "logit_bias")


@pytest.mark.parametrize("token_id", [-1, 10])
def test_an_id_outside_is_named_with_its_field(token_id: int) -> None:
    with pytest.raises(RequestError, match=f"token id {token_id} is outside the vocabulary of 10") as refused:
        check_prompt([3, token_id], 10, "messages")
    assert refused.value.param == "messages"


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="no tokens") as refused:
        check_prompt([], 10, "prompt")
    assert refused.value.param == "prompt"
