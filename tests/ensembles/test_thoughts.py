from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.thoughts import thought_spans, without_thoughts


@pytest.mark.parametrize(
    "text",
    [
        "<think>9 * 11 is 99</think> She makes $18.",
        "<think>\n\n</think>\n\nShe makes $18.",
        "<THINK>99</THINK>She makes $18.",
        "<think effort='high'>99</think>She makes $18.",
        "< think >99</ think > She makes $18.",
        "<thinking>99</thinking>She makes $18.",
        "<thought>99</thought>She makes $18.",
        "<reasoning>\n99\n</reasoning>\nShe makes $18.",
        "<seed:think>99</seed:think>She makes $18.",
        "<antThinking>99</antThinking>She makes $18.",
        "<scratchpad>99</scratchpad>She makes $18.",
        "[THINK]99[/THINK]She makes $18.",
        "◁think▷99◁/think▷She makes $18.",
        "<|START_THINKING|>99<|END_THINKING|>She makes $18.",
        "<|begin_of_thought|>99<|end_of_thought|>She makes $18.",
        "<|START_THINKING|>99<|END_THINKING|><|START_RESPONSE|>She makes $18.",
        "<|begin_of_thought|>99<|end_of_thought|>\n<|begin_of_solution|>She makes $18.",
        "<longcat_think>99</longcat_think>She makes $18.",
        "<internal_monologue>99</internal_monologue>She makes $18.",
        "<thinking_process>99</thinking_process>She makes $18.",
        "<unused94>thought\n99<unused95>She makes $18.",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
        "<|channel|>final<|message|>She makes $18.",
        "<|channel>thought\n99<channel|>She makes $18.",
        "<|channel|>analysis<|message|>99<|end|><|start|>assistant<|channel|>final<|message|>She makes $18.",
        "<|channel|>analysis<|message|>9<|end|><|start|>assistant<|channel|>commentary<|message|>99<|end|>"
        "<|start|>assistant<|channel|>final<|message|>She makes $18.",
        "analysisWe need 99.assistantfinalShe makes $18.",
        "so it is 99</think>She makes $18.",
        "so it is 99\n[/THINK]\n\nShe makes $18.",
        "<think>a <think>b</think> 99</think> She makes $18.",
        "<think>I should use <think> here. 99</think>She makes $18.",
        "<think>9</think>99</think>She makes $18.",
        "<think>99</thinking>She makes $18.",
        "<think>99</think>She makes $18.</think>",
        "She makes $18.<think>or 99? I was cut o",
        '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 s</summary>\n> 99\n</details>\n'
        "She makes $18.",
        "<DETAILS done='true' type='reasoning'><summary>Thought</summary>99</DETAILS>She makes $18.",
        "<details type=reasoning>9 <details><summary>more</summary>9</details> 99</details>She makes $18.",
        "<details type=reasoning><think>9</think>99</details>She makes $18.",
        'She makes $18.<details type="reasoning" done="false">\n<summary>Thinking…</summary>\n> or 99? I was cut o',
        '<details type="reasoning">9</details><details type="tool_calls" result="&quot;9 &lt; 99&quot;">99</details>'
        '<details type="code_interpreter">99</details>She makes $18.',
        "<think>9</think>She makes <think>99</think>$18.",
    ],
)
def test_what_stands_in_a_block_of_thoughts_is_left_out(text: str) -> None:
    assert without_thoughts(text) == "She makes $18."


@pytest.mark.parametrize("text", ["<think>It must be 99", "[THINK] 99", "so it is 99</think>", "<think>99</think>\n"])
def test_thoughts_without_an_answer_leave_nothing(text: str) -> None:
    assert without_thoughts(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  She makes $18.\n",
        "Write `<think>` before and `</think>` after it: 18.",
        "I think[1] of 18 <b>things</b>",
        "a < think and b > 18",
        "<thinker>18</thinker>",
        "<analysis>18</analysis><think_tank>18</think_tank><unused95x>",
        "Rethink this: 18 <answer>18</answer>",
        "<details><summary>How</summary>9 * 2 is 18</details>",
        '<details open class="reasoning">18</details></details> and <details type="warning">18',
        'Open WebUI writes `<details type="reasoning">` before `</details>`.',
    ],
)
def test_a_text_without_thoughts_stays_as_it_is(text: str) -> None:
    assert without_thoughts(text) == text
    assert thought_spans(text) == []


@given(st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "x", " ", "`"]), max_size=12))
def test_spans_are_in_order_apart_and_inside_the_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    ends = [place for span in thought_spans(text) for place in span]
    assert ends == sorted(ends)
    assert all(0 <= place <= len(text) for place in ends)


@pytest.mark.parametrize(
    "piece",
    [
        "<think>",
        "</think>",
        "<think a=",
        "<|channel|>analysis",
        "[THINK]x[/THINK]",
        "< ",
        "<a_",
        "<details ",
        "<details type=reasoning>",
        "<details>",
    ],
)
def test_long_hostile_texts_take_no_long_time(piece: str) -> None:
    started = time.process_time()
    without_thoughts(piece * (50_000 // len(piece)))
    assert time.process_time() - started < 2
