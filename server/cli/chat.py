"""`ensemble chat`: a conversation in the terminal, with the models of a config or of a running server.

Each answer is one run of the event loop, so that Ctrl-C cancels the answer and leaves the program. Between two answers
the loop stands still; whatever the models run beside it (the engine has its own thread) idles.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble_server.server.cli.completion import model_names
from ensemble_server.server.cli.conversation import Conversation
from ensemble_server.server.cli.paths import check_target

if TYPE_CHECKING:
    from ensemble_server.server.cli.chat_commands import Session


def chat(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|URL|MODEL...",
            help="A YAML file, or models, loaded in this process; or a server's address.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Whom to talk to; default: the main one.", autocompletion=model_names),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="A system prompt for the conversation.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="Ask this, print the answer and exit.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeats an answer.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the server's key.")
    ] = None,
) -> None:
    """Chat with a model. With --message, or text on standard input: ask once, print the answer alone, and exit."""
    from ensemble_server.ensembles.base import Sampling
    from ensemble_server.server.cli.chat_commands import Session
    from ensemble_server.server.cli.partner import partners

    for target in targets:
        check_target(target, "CONFIG|URL|MODEL")
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise typer.BadParameter("standard input holds no text to ask", param_hint="--message")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            found = runner.run(stack.enter_async_context(partners(targets, model, api_key_env)))
            conversation = Conversation(found.model(found.chosen), system, sampling)
            if message is not None:
                runner.run(conversation.ask(message, _write_text))
                typer.echo()
            else:
                _converse(runner, Session(found, conversation))
        finally:
            runner.run(stack.aclose())


def _converse(runner: asyncio.Runner, session: Session) -> None:
    """Ask and answer until /exit or the end of input."""
    from rich.console import Console

    from ensemble_server.ensembles.errors import EnsembleError
    from ensemble_server.server.cli import chat_commands
    from ensemble_server.server.cli.explained import ExplainedAnswer, visible

    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    console = Console(highlight=False)

    def show(text: str, is_reasoning: bool) -> None:
        style = "dim" if is_reasoning else None
        console.print(visible(text), end="", markup=False, soft_wrap=True, style=style)

    def tell(text: str) -> None:
        console.print(visible(text), markup=False, style="dim", soft_wrap=True)

    tell(f"{session.conversation.model.name}  {chat_commands.HELP}")
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            tell(f"\n{chat_commands.HELP}")
            continue
        except EOFError:
            console.print()
            return
        if line == "/exit":
            return
        if not line:
            continue
        explained = ExplainedAnswer(console) if session.explains else None
        start = time.perf_counter()
        try:
            if line.startswith("/"):
                tell(chat_commands.run(line, session))
                continue
            done = runner.run(session.conversation.ask(line, show, explained=explained and explained.show))
        except (KeyboardInterrupt, asyncio.CancelledError):  # the second where something else was cancelling, too
            tell("\n(stopped)")
        except EnsembleError as exc:
            console.print(f"error: {visible(str(exc))}", markup=False, style="red", soft_wrap=True)
        else:
            num_tokens, duration_s = done.usage.completion_tokens, time.perf_counter() - start
            tell(f"\n{num_tokens} tokens, {num_tokens / duration_s:.1f} tokens/s")
            if explained is not None:
                explained.print_summary(done.trace)


def _write_text(text: str, is_reasoning: bool) -> None:
    if not is_reasoning:
        sys.stdout.write(text)
        sys.stdout.flush()
