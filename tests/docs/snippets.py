"""What the pages show as code, and what stands above it.

A comment right above a snippet says who runs it, or why nobody does:

    <!-- not run: needs a GPU -->
    <!-- run by tests/clients/test_openai.py -->
    <!-- a part: replicates of a plan -->          YAML that is no config, no entries of one, and no plan

Without a comment, Python and commands are run on tiny models (`test_run_snippets.py`). Beside that commands are held to
the program (`test_commands.py`), Python is compiled and its imports are looked up (`test_snippets.py`), and YAML is
read (`test_configs.py`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ensemble_server.server.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for folder in ("", "docs", "configs", "deploy", "ensembles", "server", "experts", "examples", "data")
    for page in ((ROOT / folder).glob("*.md") if folder in ("", "docs") else (ROOT / folder).rglob("*.md"))
    if page.name != "CHANGELOG.md"
)

_PROGRAMS = "|".join(
    [
        *(f"ensemble {command}" for command in COMMANDS),
        *("ensemble --", "python", "pip", "make", "curl", "vllm", "lm_eval", "head", "docker", "buildah", "podman"),
        *("kubectl", "systemctl", "journalctl", "nginx", "promtool", "npm", "npx", "uv"),
    ]
)
_COMMAND = re.compile(rf"\$ \S|([A-Z_]+=\S+ )*(sudo )?([\w./-]*/)?({_PROGRAMS})\b")
_MARK = re.compile(r"<!-- (not run|run by|a part):? (.+?) -->", re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int  # of its first line of code, counted from 1
    language: str  # of its fence; "" for one without, and for an indented block
    text: str
    mark: tuple[str, str] | None  # what the comment above says: its kind, and the rest

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @cached_property
    def kind(self) -> str:
        """One of "python", "yaml", "shell", and "data": what a program printed, JSON, a formula."""
        if self.language in ("python", "yaml"):
            return self.language
        if self.language in ("sh", "bash", "shell", "console"):
            return "shell"
        if not self.language and self.text.startswith(("import ", "from ")):
            return "python"
        lines = [line for line in self.text.split("\n") if line.strip()]
        return "shell" if not self.language and lines and _COMMAND.match(lines[0]) else "data"

    @cached_property
    def commands(self) -> list[str]:
        """The commands of a shell snippet, joined where they go on in the next line, without comments and output."""
        return list(_commands(self.text))


def snippets(page: Path) -> list[Snippet]:
    """The fenced and the indented blocks of a page, in order."""
    return list(_snippets(page, page.read_text(encoding="utf-8").split("\n")))


def _snippets(page: Path, lines: list[str]) -> Iterator[Snippet]:
    above: list[str] = []  # what stands before the next block: the paragraph right above it
    position = 0
    while position < len(lines):
        line = lines[position]
        fence = re.match(r"^( *)(`{3,})(\w*)", line)
        if fence:
            end = next(i for i in range(position + 1, len(lines)) if lines[i].strip() == fence[2])
            block, start, language = lines[position + 1 : end], position + 1, fence[3]
            indent = len(fence[1])
            position = end + 1
        elif line.startswith("    ") and not (above and above[-1].strip()):
            end = position
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            block, start, language, indent = lines[position:end], position, "", 4
            position = end
        else:
            above.append(line)
            position += 1
            continue
        text = "\n".join(part[indent:] for part in block).strip("\n") + "\n"
        yield Snippet(page, start + 1, language, text, _mark("\n".join(above)))
        above = []


def _mark(above: str) -> tuple[str, str] | None:
    last = above.rstrip()
    found = [match for match in _MARK.finditer(last) if match.end() == len(last)]
    return (found[-1][1], " ".join(found[-1][2].split())) if found else None


def _commands(text: str) -> Iterator[str]:
    has_prompts = any(line.startswith("$ ") for line in text.split("\n"))
    command = ""
    for line in text.split("\n"):
        if command:
            command += "\n" + line
        elif has_prompts:
            command = line[2:] if line.startswith("$ ") else ""
        else:
            command = line
        bare = command.strip()
        if not bare or bare.startswith("#"):
            command = ""
        elif not bare.endswith("\\") and _is_whole(bare):
            yield bare
            command = ""


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:  # a quotation that goes on in the next line
        return False
    return True
