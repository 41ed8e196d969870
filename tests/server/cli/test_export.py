"""`ensemble export`, as its users run it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CONFIG = "models:\n  a: {path: PATH}\n  m: {method: probability_average, members: [a]}\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ensemble_server", "export", *arguments], capture_output=True, text=True
    )


@pytest.mark.slow
def test_it_writes_a_directory_and_says_how_to_load_it(tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG.replace("PATH", str(tiny["llama"])))
    done = run(str(tmp_path / "c.yaml"), "m", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "AutoModelForCausalLM.from_pretrained" in done.stdout
    assert (tmp_path / "out/config.json").is_file()


def test_an_unknown_name_is_one_line_and_exit_code_1(tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG.replace("PATH", str(tiny["llama"])))
    done = run(str(tmp_path / "c.yaml"), "n", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
