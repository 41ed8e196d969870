"""Files of prompts: what is one, what is held out, and which line is at fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.distill.chats import read_prompts


def written(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_texts_and_conversations_are_prompts_and_the_last_are_held_out(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    file = written(tmp_path, {"id": 7, "prompt": "Who?"}, {"messages": chat}, {"prompt": "When?"}, {"prompt": "Where?"})
    found = read_prompts([file], held_out=0.4)
    assert [prompt.is_held_out for prompt in found.prompts] == [False, False, True, True]
    assert found.prompts[0].messages == ({"role": "user", "content": "Who?"},)
    assert found.prompts[1].messages[1] == {"role": "user", "content": "Why?"}
    assert found.prompts[1].asked == tuple(chat)
    assert found.prompts[3].place == "prompts.jsonl, line 4"
    assert found.texts(held_out=True) == ["When?", "Where?"]


def test_a_prompt_that_is_held_out_is_taught_nowhere(tmp_path: Path) -> None:
    file = written(tmp_path, {"prompt": "Who?"}, {"prompt": "Why?"}, {"prompt": "Who?"}, {"prompt": "Who?"})
    found = read_prompts([file], held_out=0.25)
    assert [(prompt.text, prompt.is_held_out) for prompt in found.prompts] == [("Why?", False), ("Who?", True)]
    assert found.repeats == {"prompts.jsonl": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ('"Who?"', "line 2: .*object"),
        ({"text": "Who?"}, "line 2: unknown field 'text' .*; a line is"),
        ({"id": 3}, 'line 2: must be {"messages": .* and has neither'),
        ({"prompt": "Who?", "messages": []}, "line 2: .* and has both"),
        ({"prompt": " "}, "line 2: prompt must be a text that is not empty"),
        ({"messages": []}, "line 2: messages"),
        ({"messages": [{"role": "robot", "content": "Who?"}]}, "line 2: .*messages"),
        ({"messages": [{"role": "assistant", "content": "I."}]}, "line 2: the last message is the assistant's"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"prompts.jsonl, {message}"):
        read_prompts([written(tmp_path, {"prompt": "Who?"}, line, {"prompt": "Why?"})], held_out=0.4)


def test_files_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        read_prompts([written(tmp_path)], held_out=0.1)
    with pytest.raises(ConfigError, match="nothing to hold out"):
        read_prompts([written(tmp_path, {"prompt": "Who?"})], held_out=0.1)
    with pytest.raises(ConfigError, match="nothing to teach"):
        read_prompts([written(tmp_path, {"prompt": "Who?"}, {"prompt": "Who?"})], held_out=0.1)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts([tmp_path / "nowhere.jsonl"], held_out=0.1)
