"""What somebody gets who comes by pip: the sdist, the wheel made of it, and the demo served from the wheel alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False, env=os.environ, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as a distribution would: what is not in it is missing here."""
    folder = tmp_path_factory.mktemp("dist")
    sdist = folder / run(sys.executable, "-c", BUILD_SDIST, folder, cwd=ROOT).split()[-1]
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_the_wheel_owns_one_name_and_carries_what_the_code_reads(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"ensemble_server"}
    assert "ensemble_server/py.typed" in names
    carried = {name.removeprefix("ensemble_server/") for name in names}
    data = [
        file.relative_to(ROOT).as_posix()
        for folder in ("server", "ensembles")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in {".py", ".pyc", ".md"}
    ]
    assert [name for name in data if name not in carried] == []


def test_the_demo_is_served_without_the_clone(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-P", "-m", "ensemble_server", "serve", "--demo", "--port", "0"]
    where = [sys.executable, "-P", "-c", "import ensemble_server.server.hosting as m; print(m.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=env, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(site)
    with subprocess.Popen(command, cwd=elsewhere, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            [address] = next(filter(None, (re.findall(r"^curl -N (\S+)/v1/", line) for line in server.stdout)))
            body = {"model": "mix", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as response:
                answer = json.load(response)
            assert answer["usage"]["completion_tokens"] == 4
            assert answer["ensemble"]["members"] == ["base", "code", "jargon", "shakespeare"]
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
    assert list(elsewhere.iterdir()) == [elsewhere / "ensemble-demo.batches"] or not list(elsewhere.iterdir())
