"""YAML files read strictly: what another reader would silently drop or guess is a problem here.

PyYAML's safe loader, which also notes keys that are given twice and refuses values that contain themselves; and the
expansion of `${VARIABLE}` in strings afterwards. Left out: several documents in one file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from ensemble_server.ensembles.errors import ConfigError

# ${NAME} and ${NAME:-default}; $${ stands for a literal ${
_VARIABLE = re.compile(r"\$(?P<escaped>\$)?\{(?P<inside>[^}]*)\}")
_INSIDE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>.*))?", re.DOTALL)


def read_yaml(path: Path) -> tuple[Any, list[str]]:
    """The value that the YAML file at `path` holds, and its problems: keys given twice, with their lines.

    Raises `ConfigError` if the file cannot be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: must be UTF-8 text, byte {exc.start} is not") from exc
    try:
        loader = _StrictLoader(text)
        return loader.get_single_data(), loader.problems
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(
            f"{path}: {place}not valid YAML: {', '.join(filter(None, [exc.context, exc.problem]))}"
        ) from exc
    except RecursionError as exc:
        raise ConfigError(f"{path}: nested too deeply") from exc
    except Exception as exc:  # subtle: PyYAML lets whatever a value with a wrong tag (`!!bool maybe`) causes through
        raise ConfigError(f"{path}: not valid YAML: {type(exc).__name__}: {exc}") from exc


def expand_variables(value: Any) -> tuple[Any, list[str]]:
    """`value` with the environment's variables put into its strings (not keys), and a problem for each that is missing.

    `${HOST}` takes the variable, `${HOST:-localhost}` the default if it is unset or empty, `$${HOST}` stays `${HOST}`.
    """
    problems: list[str] = []
    expanded: dict[int, Any] = {}  # by identity: a value that YAML aliases repeat is expanded once

    def expand(value: Any, at: str) -> Any:
        if isinstance(value, str):
            return _VARIABLE.sub(lambda match: substitute(match, at), value)
        if not isinstance(value, dict | list):
            return value
        if id(value) not in expanded:
            if isinstance(value, dict):
                expanded[id(value)] = {key: expand(item, f"{at}.{key}".lstrip(".")) for key, item in value.items()}
            else:
                expanded[id(value)] = [expand(item, f"{at}[{index}]") for index, item in enumerate(value)]
        return expanded[id(value)]

    def substitute(match: re.Match[str], at: str) -> str:
        if match["escaped"]:
            return match[0][1:]
        inside = _INSIDE.fullmatch(match["inside"])
        if inside is None:
            problems.append(f"{at}: {match[0]!r} must be ${{NAME}} or ${{NAME:-default}}; write $${{ for a literal ${{")
            return match[0]
        found = os.environ.get(inside["name"])
        if inside["default"] is not None:
            return found or inside["default"]
        if found is None:
            problems.append(
                f"{at}: the environment variable {inside['name']} is not set; set it, or give a default: "
                f"${{{inside['name']}:-default}}"
            )
            return match[0]
        return found

    return expand(value, ""), problems


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that notes duplicate keys in `problems`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []
        # Building values depth first makes PyYAML refuse one that contains itself, instead of building the loop.
        self.deep_construct = True

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # a name or None, but PyYAML's stubs say a dict
        node = super().compose_mapping_node(anchor)
        firsts: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (first := firsts.setdefault((key.tag, key.value), key)) is not key:
                self.problems.append(
                    f"line {key.start_mark.line + 1}: key {key.value!r} is given twice "
                    f"(first in line {first.start_mark.line + 1})"
                )
        return node
