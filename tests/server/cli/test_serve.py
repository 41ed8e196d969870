from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_server.server.config.blocks import Config, HostedModel
from tests.conftest import make_model
from tests.server.cli.conftest import Run


class Api:
    """Stands in for the HTTP side: notes the config it gets and is ready at once."""

    config: Config

    async def serve(self, config: Config, *, on_ready: Callable[[int], None]) -> None:
        self.config = config
        await asyncio.sleep(0)
        on_ready(config.server.port or 54321)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    api = Api()
    monkeypatch.setitem(sys.modules, "ensemble_server.server.api.serve", types.SimpleNamespace(serve=api.serve))
    return api


def config_file(tmp_path: Path, server: str = "{}") -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(
        "models: {plain: {path: org/name}, mix: {method: probability_average, members: [plain]}}\n"
        f"server: {server}\n",
        encoding="utf-8",
    )
    return file


def test_options_replace_the_configs_address(ensemble: Callable[..., Run], api: Api, tmp_path: Path) -> None:
    file = config_file(tmp_path, "{host: 10.0.0.1, port: 7000, max_queue: 9}")
    assert ensemble("serve", file).code == 0
    assert (api.config.server.host, api.config.server.port) == ("10.0.0.1", 7000)
    run = ensemble("serve", file, "--host", "0.0.0.0", "--port", "0")
    assert (api.config.server.host, api.config.server.port, api.config.server.max_queue) == ("0.0.0.0", 0, 9)
    assert run.out.startswith(
        f"Loading plain, mix from {file} ...\nReady: http://127.0.0.1:54321/v1 serves plain, mix."
    )


def test_models_are_served_without_a_config(
    ensemble: Callable[..., Run], api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "base")
    make_model(tmp_path / "tuned", seed=1, vocab_size=321, extra=("<pad>",))
    monkeypatch.chdir(tmp_path)
    run = ensemble("serve", "base", "./tuned", "--port", "0")
    assert run.code == 0 and run.out.startswith("Loading base, tuned, mix, adaptive, ")
    assert api.config.models["base"].path == str(tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]  # nothing is written


def test_a_config_is_served_alone(ensemble: Callable[..., Run], api: Api, tmp_path: Path) -> None:
    run = ensemble("serve", config_file(tmp_path), "org/name")
    assert run.code == 1 and "is a config, which is served alone" in run.err
    run = ensemble("serve", tmp_path / "gone.yaml")
    assert run.code == 2 and "does not exist" in run.err


def test_the_demo_is_served_from_any_folder(
    ensemble: Callable[..., Run], api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ensemble("serve", "--demo").code == 0
    assert {"base", "code", "jargon", "shakespeare", "mix", "adaptive"} <= set(api.config.models)
    adapters = [model.adapter for model in api.config.models.values() if isinstance(model, HostedModel) and model.base]
    assert len(adapters) == 3
    assert all((Path(str(adapter)) / "adapter_model.safetensors").is_file() for adapter in adapters)
    assert api.config.batch_folder == tmp_path / "ensemble-demo.batches"  # not among the package's own files


def test_a_config_or_the_demo_has_to_be_named(ensemble: Callable[..., Run], api: Api, tmp_path: Path) -> None:
    for arguments in ([], [config_file(tmp_path), "--demo"]):
        run = ensemble("serve", *arguments)
        assert (run.code, "give a CONFIG, or --demo" in run.err) == (2, True)


@pytest.mark.parametrize(
    ("server", "address", "header"),
    [
        ("{}", "http://127.0.0.1:8000", None),
        ("{host: '::1', port: 1}", "http://[::1]:1", None),
        ("{api_keys_env: KEYS}", "http://127.0.0.1:8000", "Authorization: Bearer ${KEYS%%,*}"),
        ("{api_keys: [sesame]}", "http://127.0.0.1:8000", "Authorization: Bearer YOUR_KEY"),
    ],
)
def test_the_curl_line_has_address_model_and_key(
    ensemble: Callable[..., Run], api: Api, tmp_path: Path, server: str, address: str, header: str | None
) -> None:
    run = ensemble("serve", config_file(tmp_path, server))
    [line] = [line for line in run.out.splitlines() if line.startswith("curl")]
    words = shlex.split(line)
    assert words[:3] == ["curl", "-N", f"{address}/v1/chat/completions"]
    assert '"model": "mix"' in words[-1]
    headers = [words[place + 1] for place, word in enumerate(words) if word == "-H"]
    assert headers == ["Content-Type: application/json", *([header] if header else [])]
    assert "sesame" not in run.out


def test_the_shell_takes_the_first_of_several_keys() -> None:
    run = subprocess.run(
        ["sh", "-c", 'echo "Bearer ${KEYS%%,*}"'], env={"KEYS": "one,two"}, capture_output=True, text=True, check=True
    )
    assert run.stdout == "Bearer one\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="pastes a curl line")
def test_the_curl_line_works_when_pasted_and_ctrl_c_ends_the_server(tiny: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"models: {{one: {{path: {tiny['llama']}}}, it's: {{method: probability_average, members: [one]}}}}\n"
        "server: {port: 0, api_keys_env: TEST_KEYS}\nengine: {max_context: 64}\n",
        encoding="utf-8",
    )
    environment = os.environ | {"TEST_KEYS": "one,two"}
    server = subprocess.Popen(
        [sys.executable, "-m", "ensemble_server", "serve", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        line = next(line for line in server.stdout if line.startswith("curl"))
        answer = subprocess.run(
            ["sh", "-c", line.replace("curl", "curl -sS --max-time 60", 1)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.startswith("data: {")
        assert '"delta":{"role":"assistant"' in answer.stdout.replace(" ", "")
        assert answer.stdout.rstrip().endswith("data: [DONE]")
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
