"""`ensemble chat`: a conversation in the terminal, with the models of a config or of a running server.

Each answer is one run of the event loop, so that Ctrl-C cancels the answer and leaves the program. Between two answers
the loop stands still; whatever the models run beside it (the engine has its own thread) idles.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing, suppress
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import Done, Message, Model, Sampling

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."

Show: TypeAlias = Callable[[str, bool], None]  # a piece of text, and whether it is reasoning


def chat(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|URL|MODEL...",
            help="A YAML file, or models, loaded in this process; or a server's address.",
        ),
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whom to talk to; default: the main one.")] = None,
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
    from ensemble_server.server.cli.partner import partner

    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise typer.BadParameter("standard input holds no text to ask", param_hint="--message")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            spoken_to = runner.run(stack.enter_async_context(partner(targets, model, api_key_env)))
            conversation = Conversation(spoken_to, system, sampling)
            if message is not None:
                runner.run(conversation.ask(message, _write_text))
                typer.echo()
            else:
                _converse(runner, conversation)
        finally:
            runner.run(stack.aclose())


class Conversation:
    """What was said so far, with `model`. The system prompt survives a reset."""

    def __init__(self, model: Model, system: str | None, sampling: Sampling) -> None:
        self.model = model
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._sampling = sampling
        self.messages: list[Message] = []

    def reset(self) -> None:
        self.messages = []

    async def ask(self, text: str, show: Show) -> Done:
        """Pass the answer to `show` as it comes. One that is cut short stays in the conversation as far as it came.

        Raises what the model raises; the question is then as if it had not been asked.
        """
        from ensemble_server.ensembles.base import Delta, Done, GenerationRequest

        question = {"role": "user", "content": text}
        request = GenerationRequest(messages=(*self._system, *self.messages, question), sampling=self._sampling)
        answer = ""
        try:
            async with aclosing(self.model.generate(request)) as events:
                async for event in events:
                    match event:
                        case Delta():
                            if event.reasoning:
                                show(event.reasoning, True)
                            if event.text:
                                show(event.text, False)
                            answer += event.text
                        case Done():
                            done = event
        except asyncio.CancelledError:
            self._remember(question, answer)
            raise
        self._remember(question, answer)
        return done

    def _remember(self, question: Message, answer: str) -> None:
        if answer:
            self.messages += [question, {"role": "assistant", "content": answer}]


def _converse(runner: asyncio.Runner, conversation: Conversation) -> None:
    """Ask and answer until /exit or the end of input."""
    from rich.console import Console

    from ensemble_server.ensembles.errors import EnsembleError

    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    console = Console(highlight=False)

    def show(text: str, is_reasoning: bool) -> None:
        visible = "".join(char for char in text if char.isprintable() or char in "\n\t")  # no escape codes from a model
        console.print(visible, end="", markup=False, soft_wrap=True, style="dim" if is_reasoning else None)

    console.print(f"[bold]{conversation.model.name}[/bold]  [dim]{HELP}[/dim]")
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            console.print(f"\n[dim]{HELP}[/dim]")
            continue
        except EOFError:
            console.print()
            return
        match line:
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
                console.print("[dim]forgotten[/dim]")
                continue
        if line.startswith("/"):
            console.print(f"[dim]unknown command {line.split()[0]}. {HELP}[/dim]")
            continue
        start = time.perf_counter()
        try:
            done = runner.run(conversation.ask(line, show))
        except (KeyboardInterrupt, asyncio.CancelledError):  # the second where something else was cancelling, too
            console.print("\n[dim](stopped)[/dim]")
        except EnsembleError as exc:
            console.print(f"[red]error:[/red] {exc}", markup=True)
        else:
            num_tokens, duration_s = done.usage.completion_tokens, time.perf_counter() - start
            console.print(f"\n[dim]{num_tokens} tokens, {num_tokens / duration_s:.1f} tokens/s[/dim]")


def _write_text(text: str, is_reasoning: bool) -> None:
    if not is_reasoning:
        sys.stdout.write(text)
        sys.stdout.flush()
