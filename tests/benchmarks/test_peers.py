"""Engines side by side: the same tokens, one that is not there is named, and figures are per token of each phase."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peer_workers import LlamaCpp, Ours, PlainLoop, answer
from benchmarks.peers import Peer, PeerLost, Recipe, Shape, compare, has_package, measure, prompts_of, started, table
from benchmarks.subjects import Subject
from tests.conftest import make_model

PROMPTS = [[5, 90, 17, 200, 33], [6, 91, 18, 201, 34], [7, 92, 19, 202, 35]]

# Speaks the protocol, without anything to load. What it takes is given; at its third question it ends, if it is to.
STUB = """
import json, sys
told = json.loads(sys.argv[4])
if "missing" in told:
    print(json.dumps({"missing": told["missing"]}))
    raise SystemExit
print(json.dumps({"about": told["about"]}), flush=True)
for number, line in enumerate(sys.stdin):
    if number == told.get("ends_at"):
        raise SystemExit("out of memory")
    question = json.loads(line)
    seconds = {"wall_s": told["seconds"], "cpu_s": told["seconds"] / 2}
    written = [[told["token"]] * question["num_tokens"] for _ in question["prompts"]]
    print(json.dumps({"prompt": seconds, "decode": seconds, "written": written, "likeliest": [[7, -0.5]]}), flush=True)
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter whose `-m benchmarks.peer_workers` is the stub."""
    (tmp_path / "stub.py").write_text(STUB)
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {tmp_path / "stub.py"} "$@"\n')
    file.chmod(0o755)
    return str(file)


def recipe(python: str, **told: Any) -> Recipe:
    return Recipe(python, "loop", {"about": "a stub", "seconds": 1.0, "token": 3, **told}, 1)


def test_the_plain_loop_and_our_engine_write_the_same_and_find_the_same_likeliest(tmp_path: Path) -> None:
    # As many ids as the tokenizer has: a plain loop knows of no padding.
    same = {"checkpoint": str(make_model(tmp_path, vocab_size=320)), "dtype": "float32", "device": "cpu"}
    ours = Ours(**same, weights="exact", num_streams=4)
    try:
        question = {"prompts": PROMPTS, "num_tokens": 6, "likeliest": True}
        found, expected = answer(ours, question), answer(PlainLoop(**same), question)
    finally:
        ours.stop()
    assert found["written"] == expected["written"]
    assert [len(tokens) for tokens in found["written"]] == [6, 6, 6]
    known = dict(expected["likeliest"])
    assert all(logprob == pytest.approx(known[token], abs=1e-3) for token, logprob in found["likeliest"])
    for phase in ("prompt", "decode"):
        assert found[phase]["wall_s"] > 0


@pytest.mark.slow
def test_llama_cpp_writes_what_the_plain_loop_does(tiny: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled when it is installed")
    peers.write_gguf(tiny["llama"], tmp_path / "float32.gguf", "float32")
    llama = LlamaCpp(file=str(tmp_path / "float32.gguf"), num_streams=4, num_context=64, num_threads=1, gpu=False)
    question = {"prompts": PROMPTS, "num_tokens": 6, "likeliest": True}
    loop = PlainLoop(checkpoint=str(tiny["llama"]), dtype="float32", device="cpu")
    found, expected = answer(llama, question), answer(loop, question)
    assert found["written"] == expected["written"]
    known = dict(expected["likeliest"])
    assert all(logprob == pytest.approx(known[token], abs=0.05) for token, logprob in found["likeliest"])


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(PeerLost, match="/nowhere/python does not run: No such file"),
        started(recipe("/nowhere/python")),
    ):
        pass


def test_what_an_engine_says_that_it_lacks_is_told(python: str) -> None:
    with pytest.raises(PeerLost, match="no shared library"), started(recipe(python, missing="no shared library")):
        pass


def test_a_package_that_an_interpreter_lacks_is_known() -> None:
    assert not has_package(sys.executable, "no_such_package")
    assert not has_package("/no/python", "json")
    assert has_package(sys.executable, "ensemble_server")


def test_figures_are_milliseconds_per_token_and_ratios_those_within_a_repeat(python: str) -> None:
    shape = Shape(streams=(1, 4), num_prompt_tokens=10, num_tokens=6)
    with ExitStack() as stack:
        both = {
            "ours": stack.enter_context(started(recipe(python))),
            "slow": stack.enter_context(started(recipe(python, seconds=3.0))),
        }
        figures, lost = measure(both, list(range(100)), shape, repeats=2)
    assert not lost
    assert figures["ours"]["prompt@4 wall"] == pytest.approx([25.0, 25.0])  # 1 s for 4 × 10 tokens
    assert figures["ours"]["decode@1 cpu"] == pytest.approx([100.0, 100.0])  # 0.5 s for 5 of 6 tokens
    told = table(figures, shape.streams, "wall", against="ours").splitlines()
    assert told[-1] == "| slow | " + " | ".join(["3.00 (3.00 to 3.00)"] * 4) + " |"


def test_an_engine_that_ends_is_left_out_with_its_last_words(python: str) -> None:
    with ExitStack() as stack:
        both: dict[str, Peer] = {
            "ours": stack.enter_context(started(recipe(python))),
            "ends": stack.enter_context(started(recipe(python, ends_at=2, token=4))),
        }
        about = compare(both, list(range(100)), Shape())
        figures, lost = measure(both, list(range(100)), Shape(streams=(1,)), repeats=2)
    assert "the first 12 as ours" in about["ours"]
    assert "the first 0 as ours" in about["ends"]
    assert lost == {"ends": "it ended with 1: out of memory"}
    assert list(figures) == ["ours"]


def test_streams_read_different_pieces_of_the_text() -> None:
    pieces = prompts_of(list(range(50)), 4, 12, begin=1)
    assert pieces[0] == list(range(12, 24))
    assert pieces[3] == [48, 49, *range(10)]


def test_what_cannot_run_is_left_out_with_the_reason_and_the_rest_runs(
    tiny: dict[str, Path],
    python: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "has_package", lambda python, package: package != "vllm")
    chosen = {
        "plain loop": recipe(python),
        "llama.cpp q8_0": Recipe(python, "llama.cpp", {"file": str(tmp_path / "gguf" / "q8_0.gguf")}, 1),
        "vLLM": Recipe("/some/python", "vllm", {}, 1),
    }
    with ExitStack() as stack:
        results = peers.run(
            Subject(str(tiny["qwen"])), Shape(streams=(1,)), chosen, 1, stack, file=tmp_path / "results.json"
        )
    assert "only llama is written" in results["left_out"]["llama.cpp q8_0"]
    assert results["left_out"]["vLLM"] == "/some/python has no vllm"
    assert "llama.cpp q8_0 left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_bytes()) == results
