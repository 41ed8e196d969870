from __future__ import annotations

import pytest

from ensemble_server.ensembles.base import Sampling
from ensemble_server.ensembles.errors import EnsembleError
from ensemble_server.server.cli.chat_commands import COMMANDS, Session, run
from ensemble_server.server.cli.conversation import Conversation
from ensemble_server.server.cli.partner import Partners
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel


@pytest.fixture
def session() -> Session:
    models = {name: ScriptedModel(name, Script(("yes",))) for name in ("base", "code", "mix")}
    partners = Partners(list(models), "mix", {"mix": {"base": 1, "code": 2}}, models.__getitem__)
    return Session(partners, Conversation(models["mix"], None, Sampling()))


async def asked(session: Session) -> object:
    """What the model is asked next."""
    explained = (lambda _: None) if session.explains else None
    await session.conversation.ask("hi", lambda *_: None, explained=explained)
    return session.conversation.model.requests[-1]  # type: ignore[attr-defined]


def test_help_has_a_line_for_every_command(session: Session) -> None:
    lines = run("/help", session).splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS, "/exit"]


async def test_model_goes_on_with_another_and_what_was_said(session: Session) -> None:
    await asked(session)
    run("/weights base=3", session)
    assert run("/model", session) == "  base\n  code\n* mix"
    assert run("/model code", session) == "talking to code"
    request = await asked(session)
    assert [message["content"] for message in request.messages] == ["hi", "yes", "hi"]
    assert request.overrides == {}  # weights belong to the model that was left
    with pytest.raises(EnsembleError, match="there is no model 'cod'; did you mean 'code'"):
        run("/model cod", session)


async def test_system_sets_shows_and_removes(session: Session) -> None:
    assert run("/system", session) == "no system prompt"
    assert run("/system Be brief.", session) == "Be brief."
    request = await asked(session)
    assert request.messages[0] == {"role": "system", "content": "Be brief."}
    assert run("/system none", session) == "no system prompt"
    assert (await asked(session)).messages[0]["role"] == "user"


async def test_weights_take_the_place_of_the_configured_ones_until_reset(session: Session) -> None:
    assert run("/weights", session) == "base=1, code=2"
    assert run("/weights base=1, code=0.5", session) == "base=1, code=0.5"
    assert (await asked(session)).overrides == {"weights": {"base": 1, "code": 0.5}}
    assert run("/weights reset", session) == "base=1, code=2"
    assert (await asked(session)).overrides == {}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/weights bas=1", "'bas' is no member (members: base, code)"),
        ("/weights base=much", "the weight of base must be a number, got 'much'"),
        ("/weights base", "the weight of base must be a number, write base=NUMBER"),
        ("/explain maybe", "/explain takes on or off"),
        ("/rest", "unknown command /rest. /help lists commands"),
    ],
)
def test_what_cannot_be_done_is_explained(session: Session, line: str, error: str) -> None:
    with pytest.raises(EnsembleError) as caught:
        run(line, session)
    assert str(caught.value).startswith(error)
    assert session.conversation.weights == {}


def test_a_single_model_has_no_weights(session: Session) -> None:
    run("/model base", session)
    with pytest.raises(EnsembleError, match="base has no weights"):
        run("/weights", session)


async def test_explain_asks_for_the_explanation_and_for_tokens(session: Session) -> None:
    request = await asked(session)
    assert (request.explain, request.top_logprobs) == (False, None)
    assert "colour" in run("/explain", session)
    request = await asked(session)
    assert (request.explain, request.top_logprobs) == (True, 0)
    session.conversation.model.explains_tokens = False  # type: ignore[misc]
    assert "the method tells" in run("/explain on", session)
    assert (await asked(session)).top_logprobs is None
    assert run("/explain off", session) == "answers are shown plainly"
