"""The page of every refusal, made from the code: each message that an error of ours can carry, and what it becomes.

Reads the sources, imports none of them but the table of error codes. A message is what stands in the call of an error's
class, or what a check of configs notes as a problem; "…" is what it fills in.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ensemble_server.server.api.errors import STATUS_KINDS
from ensemble_server.server.requests.errors import KINDS

ROOT = Path(__file__).parents[1]
FILLED_IN = "…"
OURS = {cls.__name__: kind for cls, kind in KINDS.items()}
# Raised by what checks a config's or a body's values: pydantic gathers them into the one error of it.
VALUE_ERRORS = ("server/config", "server/compare/planning", "server/compare/arms", "server/requests", "ensembles/")

SECTIONS = {
    "config": "In a config or a plan, before anything runs",
    "request": "In a request or a row",
    "command": "On the command line",
    "running": "While it runs",
}
_INTRODUCTION = """# Every refusal

Made from the code when the site is built: what an error can say, with … for what it fills in. Find yours with the
search, or with your browser's; most say themselves what to do. [Troubleshooting](troubleshooting.md) tells what the
codes mean.
"""


@dataclass(frozen=True, order=True)
class Refusal:
    section: str  # a key of SECTIONS
    message: str
    code: str  # of OpenAI's error object; "" where no HTTP answer carries it


def page() -> str:
    """The page, as Markdown."""
    found = sorted(set(refusals()))
    parts = [_INTRODUCTION]
    for section, title in SECTIONS.items():
        lines = [_line(refusal) for refusal in found if refusal.section == section]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(refusal: Refusal) -> str:
    message = " ".join(refusal.message.split()).replace("`", "'")
    return f"- `{message}`" + (f" · {refusal.code}" if refusal.code else "")


@cache
def refusals() -> tuple[Refusal, ...]:
    """All of them, in the order of the files."""
    files = sorted([*ROOT.glob("ensembles/**/*.py"), *ROOT.glob("server/**/*.py")])
    return tuple(
        refusal
        for path in files
        for refusal in _of_file(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8")))
    )


def _of_file(name: str, tree: ast.Module) -> Iterator[Refusal]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=cls) | ast.Attribute(attr=cls), args=args):
                if cls in OURS:
                    code = OURS[cls].code or ""
                    section = _section(OURS[cls].status)
                elif cls == "ValueError" and name.startswith(VALUE_ERRORS):
                    section, code = ("request", "invalid_value") if "requests" in name else ("config", "")
                elif cls == "BadParameter":
                    section, code = "command", ""
                elif cls == "HTTPException" and args and isinstance(args[0], ast.Constant):
                    kind = STATUS_KINDS.get(args[0].value)  # type: ignore[arg-type]
                    section, code = "request", (kind.code or "") if kind else ""
                else:
                    continue
                texts = (text for argument in args for text in texts_of(argument))
                yield from (Refusal(section, text, code) for text in texts if _is_a_sentence(text))
            case ast.FunctionDef(name=function) if "problem" in function:
                for text in _noted(node):
                    yield Refusal("config", text, "")
            case ast.Call(func=ast.Attribute(value=value, attr="append"), args=[text]) if _is_problems(value):
                yield from (Refusal("config", said, "") for said in texts_of(text) if _is_a_sentence(said))


def _section(status: int) -> str:
    if status == 500:
        return "config"  # of these a server's clients see none: it does not start with them
    return "request" if status < 500 and status != 429 else "running"


def _noted(function: ast.FunctionDef) -> Iterator[str]:
    """What a function that looks for problems yields or returns."""
    for node in ast.walk(function):
        match node:
            case ast.Yield(value=ast.expr() as value) | ast.Return(value=ast.expr() as value):
                yield from filter(_is_a_sentence, texts_of(value))


def _is_problems(value: ast.expr) -> bool:
    return (isinstance(value, ast.Name) and value.id == "problems") or (
        isinstance(value, ast.Attribute) and value.attr == "problems"
    )


def texts_of(expression: ast.expr) -> list[str]:
    """What an expression may say: of a conditional one, both branches."""
    match expression:
        case ast.IfExp(body=body, orelse=other):
            return [*texts_of(body), *texts_of(other)]
    return [text_of(expression)]


def text_of(expression: ast.expr) -> str:
    """What an expression says, with "…" for what is known only later."""
    match expression:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
    return FILLED_IN


def _is_a_sentence(text: str) -> bool:
    return len(text.replace(FILLED_IN, "").split()) >= 2
