from __future__ import annotations

import inspect
import re

import pytest

from ensemble_server.ensembles import errors
from ensemble_server.ensembles.errors import ConfigError, EnsembleError, MemberError, RequestError, TurnoutError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, EnsembleError)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_tree_in_the_docstring_is_the_tree(cls: type[EnsembleError]) -> None:
    lines = [line for line in errors.__doc__.splitlines() if re.search(r"\w+Error", line) and "`" not in line]
    depth = {re.search(r"\w+Error", line).group(): re.search(r"\w+Error", line).start() for line in lines}
    names = list(depth)
    assert sorted(names) == sorted(cls.__name__ for cls in CLASSES)
    if cls is EnsembleError:
        return
    above = names[: names.index(cls.__name__)]
    parent = next(name for name in reversed(above) if depth[name] < depth[cls.__name__])
    assert cls.__mro__[1].__name__ == parent


@pytest.mark.parametrize("cls", [ConfigError, RequestError])
def test_what_a_user_wrote_wrongly_is_a_value_error(cls: type[EnsembleError]) -> None:
    assert issubclass(cls, ValueError)  # pydantic collects those


def test_a_request_error_names_the_field() -> None:
    assert RequestError("too long", param="messages").param == "messages"
    assert RequestError("too long").param is None


def test_a_member_error_names_the_member() -> None:
    error = MemberError("code", "it died")
    assert (error.member, str(error)) == ("code", "member 'code': it died")


def test_missing_turnout_says_who_was_silent_and_why() -> None:
    error = TurnoutError("crowd", {"a": "timed out", "b": "HTTP 500"}, answered=1, required=2)
    assert str(error) == "member 'crowd': 1 members answered, min_turnout is 2 (a: timed out; b: HTTP 500)"
    assert error.silent == {"a": "timed out", "b": "HTTP 500"}
