"""What a line that begins with a slash does in `ensemble chat`. A new one is a function and a row in `COMMANDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble_server.ensembles.errors import EnsembleError

if TYPE_CHECKING:
    from ensemble_server.server.cli.conversation import Conversation
    from ensemble_server.server.cli.partner import Partners


@dataclass
class Session:
    """One run of `ensemble chat`: whom there is to talk to, what was said, and how answers are shown."""

    partners: Partners
    conversation: Conversation
    explains: bool = False


def run(line: str, session: Session) -> str:
    """Do what `line`, "/command argument", asks, and return what to tell the user. Raises `EnsembleError` where it
    cannot be done."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise EnsembleError(f"unknown command {name}. {HELP}")
    return COMMANDS[name][2](session, argument.strip())


def _help(_session: Session, _argument: str) -> str:
    width = max(len(f"{name} {takes}") for name, (takes, _, _) in COMMANDS.items())
    lines = [f"{f'{name} {takes}':<{width}}  {told}" for name, (takes, told, _) in COMMANDS.items()]
    return "\n".join([*lines, f"{'/exit':<{width}}  leaves, as Ctrl-D does; Ctrl-C stops an answer"])


def _model(session: Session, argument: str) -> str:
    if argument:
        session.conversation.turn_to(session.partners.model(argument))
        return f"talking to {argument}"
    current = session.conversation.model.name
    return "\n".join(f"{'*' if name == current else ' '} {name}" for name in session.partners.names)


def _system(session: Session, argument: str) -> str:
    if argument:
        session.conversation.system = None if argument == "none" else argument
    return session.conversation.system or "no system prompt"


def _weights(session: Session, argument: str) -> str:
    conversation = session.conversation
    configured = session.partners.weights.get(conversation.model.name)
    if not configured:
        raise EnsembleError(f"{conversation.model.name} has no weights; they belong to ensembles (/model names them)")
    if argument == "reset":
        conversation.weights = {}
    elif argument:
        conversation.weights = _parsed(argument, set(configured))
    shown = conversation.weights or configured
    return ", ".join(f"{name}={weight:g}" for name, weight in shown.items())


def _parsed(argument: str, members: set[str]) -> dict[str, float]:
    weights = {}
    for part in argument.replace(",", " ").split():
        name, is_pair, number = part.partition("=")
        if name not in members:
            raise EnsembleError(f"{name!r} is no member (members: {', '.join(sorted(members))})")
        try:
            weights[name] = float(number)
        except ValueError:
            got = f"got {number!r}" if is_pair else f"write {name}=NUMBER"
            raise EnsembleError(f"the weight of {name} must be a number, {got}") from None
    return weights


def _explain(session: Session, argument: str) -> str:
    if argument not in ("", "on", "off"):
        raise EnsembleError(f"/explain takes on or off, or turns the other way; got {argument!r}")
    session.explains = argument == "on" if argument else not session.explains
    if not session.explains:
        return "answers are shown plainly"
    if session.conversation.model.explains_tokens:
        return "tokens have the colour of the member that drove them"
    return "answers are followed by what the method tells of them"


def _reset(session: Session, _argument: str) -> str:
    session.conversation.reset()
    return "forgotten"


COMMANDS: dict[str, tuple[str, str, Callable[[Session, str], str]]] = {
    "/help": ("", "shows this", _help),
    "/model": ("[NAME]", "shows the models, or goes on with another", _model),
    "/system": ("[TEXT]", "shows the system prompt, or sets it; none removes it", _system),
    "/weights": (
        "[A=1 B=0.5]",
        "shows the members' weights, or sets them; reset takes the config's",
        _weights,
    ),
    "/explain": (
        "[on|off]",
        "colours tokens by the member that drove them; shows the candidates of a vote",
        _explain,
    ),
    "/reset": ("", "forgets the conversation", _reset),
}
HELP = "/help lists commands, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."
