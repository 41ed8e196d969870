"""Methods from other packages, by the entry points of a distribution that is installed for the test."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ensemble_server.ensembles.base import GenerationRequest, collect
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.registry import METHODS, method_class
from ensemble_server.server.config.loading import load_config

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-method.md"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """install("name", "method = module:Class", module="its code"): a distribution on the path, as pip leaves it."""
    modules: list[str] = []

    def install(name: str, points: str, **code: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ensemble_server.methods]\n{points}\n")
        for module, text in code.items():
            (tmp_path / f"{module}.py").write_text(text)
            modules.append(module)

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for module in modules:
        sys.modules.pop(module, None)


def code_of_the_page(language: str = "python") -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


async def test_the_method_of_the_docs_page_is_a_method_like_the_others(
    install: Callable, talker: Callable, compose: Callable
) -> None:
    install("quick", "first_to_answer = first_to_answer:FirstToAnswer", first_to_answer=code_of_the_page())
    assert method_class("first_to_answer").__name__ == "FirstToAnswer"
    members = [talker("slow", "too late", delay_s=float("inf")), talker("fast", "here I am")]
    quick = compose({"method": "first_to_answer"}, members)
    answer = await collect(quick, GenerationRequest(prompt="Who?", n=2))
    assert [choice.text for choice in answer.choices] == ["here I am", "here I am"]
    assert members[0].num_running == 0
    with pytest.raises(ValueError, match="min_wordz"):
        compose({"method": "first_to_answer", "min_wordz": 1}, members)


def test_a_config_may_name_it(install: Callable, tmp_path: Path) -> None:
    install("quick", "first_to_answer = first_to_answer:FirstToAnswer", first_to_answer=code_of_the_page())
    file = tmp_path / "config.yaml"
    file.write_text(
        "models:\n  a: {url: 'http://127.0.0.1:9/v1'}\n  q: {method: first_to_answer, members: [a], min_words: 3}\n"
    )
    assert load_config(file).models["q"].min_words == 3
    file.write_text(code_of_the_page("yaml"))
    assert load_config(file).models["quick"].min_words == 3


def test_names_of_this_package_are_not_replaced(install: Callable) -> None:
    install("rival", "majority = nowhere:Rival")
    assert method_class("majority").__module__ == METHODS["majority"].partition(":")[0]


@pytest.mark.parametrize(
    ("points", "code", "reason"),
    [
        ("odd = no_such_module_anywhere:Odd", "", "'odd' of package 'strange' cannot be loaded: ModuleNotFoundError"),
        ("odd = strange_module:Missing", "", "cannot be loaded: AttributeError"),
        ("odd = strange_module:Odd", "raise RuntimeError('no licence')", "cannot be loaded: RuntimeError: no licence"),
        ("odd = strange_module:Odd", "Odd = 5", "must be a class derived from Method, got 5"),
        (
            "odd = strange_module:Odd",
            "from ensemble_server.ensembles.method import Method\nclass Odd(Method): pass",
            "must have a class Config derived from MethodConfig",
        ),
    ],
)
def test_what_is_no_method_is_named_with_its_package(install: Callable, points: str, code: str, reason: str) -> None:
    install("strange", points, strange_module=code)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        method_class("odd")


def test_two_packages_with_one_name_are_named(install: Callable) -> None:
    install("ann", "same = ann_module:A")
    install("bob", "same = bob_module:B")
    with pytest.raises(ConfigError, match="'same' is added by package 'ann' and package 'bob'; uninstall all but one"):
        method_class("same")


def test_an_unknown_method_knows_those_of_others_too(install: Callable) -> None:
    install("quick", "first_to_answer = first_to_answer:FirstToAnswer")
    with pytest.raises(ConfigError, match="did you mean 'first_to_answer'"):
        method_class("first_to_anwser")
