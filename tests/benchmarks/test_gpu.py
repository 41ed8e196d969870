"""All benchmarks of speed in one go: one that fails, or lacks something, is named, and the rest fill the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.gpu import (
    FULL,
    QUICK,
    Part,
    Row,
    of_decode,
    of_http,
    of_peers,
    of_scaling,
    of_speculation,
    of_vllm,
    parts_of,
    report,
    run_parts,
    write_config,
)
from benchmarks.subjects import Subject
from ensemble_server.server.config.loading import load_config


def rows_of(results: Any) -> Iterator[Row]:
    for name, speed in results.items():
        yield Row(name, 1, speed, [2.0, 1.5, 2.5], "nothing")


def part(name: str, out: Path, code: str, lacks: str = "") -> Part:
    return Part(name, [sys.executable, "-S", "-c", code, str(out / f"{name}.json")], rows_of, lacks)


def test_what_fails_or_lacks_something_is_named_and_the_rest_counts(tmp_path: Path) -> None:
    parts = [
        part("good", tmp_path, "import sys; open(sys.argv[1], 'w').write('{\"good\": 5.0}')"),
        part("fails", tmp_path, "raise SystemExit('no such device')"),
        part("lacking", tmp_path, "", lacks="there is no vLLM"),
    ]
    rows, missing = run_parts(parts, tmp_path, seconds=60)
    assert [row.what for row in rows] == ["good"]
    assert missing == [
        f"fails: it ended with 1, see {tmp_path / 'fails.log'}",
        "lacking: left out, there is no vLLM",
    ]
    assert (tmp_path / "fails.log").read_text() == "no such device\n"
    told = report(Subject("a/model", "bfloat16", "cpu"), rows, missing)
    assert "| good | 1 | 5.0 | 2.00x (1.50 to 2.50) | nothing |" in told
    assert "- lacking: left out, there is no vLLM" in told


def test_what_is_not_done_in_time_is_ended_and_what_would_follow_left_out(tmp_path: Path) -> None:
    hangs = part("hangs", tmp_path, "import threading; threading.Event().wait()")
    rows, missing = run_parts([hangs, part("late", tmp_path, "")], tmp_path, seconds=0.1)
    assert not rows
    assert missing == [
        f"hangs: ended when the time was over, see {tmp_path / 'hangs.log'}",
        "late: left out, the time was over",
    ]


def test_each_part_is_told_what_to_measure_and_where_to_write(tmp_path: Path) -> None:
    subject = Subject("org/model", "bfloat16", "cuda:1")
    parts = {part.name: part for part in parts_of(subject, tmp_path, "/no/python", quick=False)}
    assert set(parts) == set(FULL) == set(QUICK)
    for name, one in parts.items():
        assert one.command[2] == f"benchmarks.{name}"
        assert one.command[-1] == str(tmp_path / f"{name}.json")
        if name != "http":
            assert " ".join(one.command).count("--model org/model --dtype bfloat16 --device cuda:1") == 1
    assert parts["vllm"].lacks == "/no/python has no vLLM; --vllm-python names another"
    assert "the demo's experts" in parts["speculation"].lacks


def test_the_server_is_given_four_members_on_the_base(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_config(Subject(str(tiny["llama"]), "float32", "cpu"), tmp_path, tmp_path / "http.yaml")
    config = load_config(tmp_path / "http.yaml")
    assert len(yaml.safe_load((tmp_path / "http.yaml").read_text())["models"]["mix"]["members"]) == 4
    assert config.models["base"].device == "cpu"


def test_results_become_rows() -> None:
    block = {"tokens_per_s": 80.0, "against_loop": [4.0, 3.0, 5.0], "cost_in_singles": [2.0, 1.0, 4.0]}
    one, two, alone = of_decode({"separate 1": {"engine": {"4": block}}, "adapters 2": {"engine": {"4": block}}})
    assert (one.what, one.ratio) == ("one model", [4.0, 3.0, 5.0])
    assert two.what == alone.what == "2 members on one base"
    assert (alone.against, alone.ratio) == ("one of them alone", [0.5, 0.25, 1.0])

    ours, theirs = {"decode@4 wall": [5.0, 5.0], "decode@4 cpu": [1.0, 1.0]}, {"decode@4 wall": [10.0, 20.0]}
    (peer,) = of_peers({"ms_per_token": {"plain loop": theirs, "ours": ours}})
    assert (peer.tokens_per_s, list(peer.ratio), peer.against) == (200.0, [3.0, 2.0, 4.0], "plain loop")

    told = {"http_tokens_per_s": 50.0, "http_against_engine": 0.9, "http_against_engine_spread": [0.8, 1.0]}
    assert next(of_http({"16": told})).ratio == [0.9, 0.8, 1.0]

    arms = {"off": {}, "text": {"tokens_per_s": 9.0, "against_off": 1.5}}
    (drafts,) = of_speculation({"3 members, chat, 1 streams": arms})
    assert (drafts.streams, drafts.ratio) == (1, [1.5])

    point = {"members": 1, "context": 128, "num_shared": 0}
    records = [{**point, "rows": 1, "wall": [10.0]}, {**point, "rows": 4, "wall": [20.0]}]
    (more,) = of_scaling({"rows": records})
    assert (more.tokens_per_s, list(more.ratio)) == (200.0, [2.0, 2.0, 2.0])

    (inside,) = of_vllm({"single@1": [{"wall_s": 1.0}], "two@1": [{"wall_s": 2.0}]})
    assert list(inside.ratio) == [0.5, 0.5, 0.5]


@pytest.mark.slow
def test_a_quick_run_on_a_cpu_measures_a_tiny_model(tiny: dict[str, Path], tmp_path: Path) -> None:
    parts = parts_of(Subject(str(tiny["llama"]), "float32", "cpu"), tmp_path, "/no/python", quick=True)
    rows, missing = run_parts([part for part in parts if part.name in ("decode", "scaling")], tmp_path, seconds=300)
    assert not missing, (tmp_path / "decode.log").read_text() + (tmp_path / "scaling.log").read_text()
    assert {row.against for row in rows if row.streams == 2} >= {"plain loop over them", "one of them alone"}
    assert json.loads((tmp_path / "scaling.json").read_bytes()).keys() == {"rows", "adapters", "separate", "context"}
