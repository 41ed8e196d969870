"""docs/clients.md: its examples in Python run as they stand, but for the address. Those of Node: test_node.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.scripted import in_thread
from tests.docs.snippets import ROOT, Snippet, snippets

MINE = ("run by", "tests/clients/test_page.py")
EXAMPLES = [snippet for snippet in snippets(ROOT / "docs" / "clients.md") if snippet.mark == MINE]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with in_thread(tmp_path_factory.mktemp("scripted")) as url:
        yield url


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_an_example_runs_as_it_stands(example: Snippet, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "http://127.0.0.1:8000" in example.text
    code = example.text.replace("http://127.0.0.1:8000", url)
    exec(compile(code, str(example), "exec"), {})
    assert "Hello world" in capsys.readouterr().out
