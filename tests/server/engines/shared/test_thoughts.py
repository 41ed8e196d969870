from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ensemble_server.ensembles.base import GenerationRequest, Grammar, Sampling
from ensemble_server.server.engines.shared.choice_text import ChoiceText
from ensemble_server.server.engines.shared.thoughts import ThoughtBytesLimit, ThoughtStream, thought_stream
from ensemble_server.server.weights.thinking import KNOWN, Markers, markers_in
from ensemble_server.server.weights.view import Surface
from tests.conftest import make_tokenizer

THINK = Markers("<think>", "</think>")


def told_apart(text: str, cuts: list[int], *, is_open: bool = False) -> tuple[str, str]:
    stream = ThoughtStream(THINK, is_open=is_open)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [stream.add(text[a:b]) for a, b in pairwise(places)] + [stream.flush()]
    return "".join(answer for answer, _ in parts), "".join(thought for _, thought in parts)


CASES = [
    ("<think>\nSo 9 * 2.\n</think>\n\nShe makes 18.", False, ("She makes 18.", "So 9 * 2.")),
    ("\n<think>a</think>b", False, ("b", "a")),
    ("So 9 * 2.\n</think>\n\n18", True, ("18", "So 9 * 2.")),
    ("<think></think>\n\n18", False, ("18", "")),
    ("Just 18. Then <think> is a word.", False, ("Just 18. Then <think> is a word.", "")),
    ("<thin air", False, ("<thin air", "")),
    ("  18 ", False, ("  18 ", "")),
    ("<think>never ends </thi", False, ("", "never ends </thi")),
    ("cut off in thought \n", True, ("", "cut off in thought")),
    ("<think>a < b </ c</think> d <think>e</think>", False, ("d <think>e</think>", "a < b </ c")),
    ("", True, ("", "")),
]


@pytest.mark.parametrize(("text", "is_open", "expected"), CASES)
@given(cuts=st.lists(st.integers(0, 45), max_size=6))
def test_however_it_is_cut_thoughts_and_answer_are_the_same(
    text: str, is_open: bool, expected: tuple[str, str], cuts: list[int]
) -> None:
    assert told_apart(text, cuts, is_open=is_open) == expected
    assert told_apart(text, list(range(len(text))), is_open=is_open) == expected


@pytest.mark.parametrize("markers", KNOWN)
def test_markers_are_found_in_templates(markers: Markers) -> None:
    assert markers_in(f"{{% if x %}}{{{{ content.split('{markers.end}')[-1] }}}}{{% endif %}}") == markers
    assert markers_in("{{ messages }}") is None and markers_in(None) is None


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)
CHAT = GenerationRequest(messages=({"role": "user", "content": "Hi"},))


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Surface(AutoTokenizer.from_pretrained(folder), chat_template=TEMPLATE)


def answered(surface: Surface, text: str, request: GenerationRequest = CHAT) -> tuple[str, str]:
    """What a client sees of a model that writes `text`, and the reasoning beside it."""
    prompt = surface.render(request.messages or (), template_kwargs=request.template_kwargs)
    choice = ChoiceText(
        0,
        request.sampling,
        surface,
        max_new_tokens=1000,
        eos_ids=frozenset({2}),
        thoughts=thought_stream(request, surface, prompt),
    )
    deltas = [choice.add(token_id) for token_id in surface.encode(text)] + [choice.add(2)]
    return "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas)


def test_a_template_that_opens_thoughts_needs_no_opening_marker(surface: Surface) -> None:
    assert answered(surface, "So.\n</think>\n\n18") == ("18", "So.")


def test_where_the_template_closes_them_the_answer_is_whole(surface: Surface) -> None:
    assert answered(surface, "18", replace(CHAT, template_kwargs={"enable_thinking": False})) == ("18", "")


def test_nothing_is_told_apart_in_raw_texts_under_a_grammar_or_when_it_is_off(surface: Surface) -> None:
    prompt = surface.render(CHAT.messages or ())
    assert thought_stream(GenerationRequest(prompt="x"), surface, prompt) is None
    bound = replace(CHAT, sampling=Sampling(grammar=Grammar("regex", "(yes|no)")))
    assert thought_stream(bound, surface, prompt) is None
    off = Surface(surface.tokenizer, chat_template=TEMPLATE, thinking="off")
    assert thought_stream(CHAT, off, prompt) is None
    own = Surface(surface.tokenizer, chat_template="{{ messages[0].content }}", thinking=Markers("((", "))"))
    assert answered(own, "((hm)) 18") == ("18", "hm")


def forced(limit: ThoughtBytesLimit, text: bytes, num_tokens: int) -> bytes:
    """All that comes behind `text` without being drawn."""
    begin = len(text)
    while (byte := limit.next(num_tokens, text, is_whole=True)) is not None:
        text += bytes([byte])
    return text[begin:]


def test_an_end_that_is_forced_by_bytes_goes_on_with_what_is_there_of_it() -> None:
    limit = ThoughtBytesLimit(3, b"</think>")
    assert forced(limit, b"well", 2) == b""
    assert forced(limit, b"well", 3) == b"</think>"
    assert forced(limit, b"well </th", 3) == b"ink>"
    assert forced(limit, b"well </think> so", 4) == b"", "its pieces have not settled yet"
    assert limit.next(3, "caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode()[:-1], is_whole=False) is None
