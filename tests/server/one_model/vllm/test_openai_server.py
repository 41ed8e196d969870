"""vLLM's own server on an exported directory, with no flag that speaks of ensembles; real processes, real HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import numpy as np
import pytest

pytest.importorskip("vllm")

from tests.server.one_model.vllm.engines import TOLERANCE_NATS, VOCAB_SIZE, exported, reference_of

pytestmark = pytest.mark.vllm

WEIGHTS = {"llama": 1, "deep": 2, "qwen": 1}
TEXT = "The quick brown fox jumps over the lazy dog. The quick"
CHAT = [{"role": "user", "content": "To be, or not to be?"}]


@pytest.fixture(scope="module")
def server(members, tmp_path_factory):
    """A client of a server of the posterior mixture. Its processes are gone at the end."""
    root = tmp_path_factory.mktemp("server")
    folder = exported(members, root / "mix", members=WEIGHTS, pool="posterior")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = "--max-model-len 256 --max-num-seqs 4 --max-num-batched-tokens 32 --block-size 32"
    command = f"--model {folder} --served-model-name mix --port {port} --dtype float32 --enforce-eager {sizes}"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command.split()],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            _wait(client, process, root / "log")
            yield client
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine and worker, should they still be there


def _wait(client, process, log) -> None:
    for _ in range(1800):  # seconds on a machine of its own, many minutes on a busy one
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def mixture(members):
    """token ids -> (T, V): the reference's log-probabilities after each token."""
    reference = reference_of(members)
    return lambda ids, weights=WEIGHTS, pool="posterior": reference(pool, weights, ids)[0]


def complete(server, **body):
    answer = server.post("/v1/completions", json={"model": "mix", "prompt": TEXT, "max_tokens": 8} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(server, **body):
    answer = server.post("/v1/chat/completions", json={"model": "mix", "messages": CHAT, "max_tokens": 12} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_prompts_log_probabilities_are_the_mixtures(server, mixture):
    choice = complete(server, echo=True, logprobs=0, temperature=0, return_token_ids=True)["choices"][0]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    expected = mixture(ids)
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is None
    told = [expected[position - 1, ids[position]] for position in range(1, len(ids))]
    assert np.abs(np.array(found[1:]) - told).max() < TOLERANCE_NATS


@pytest.mark.parametrize(
    ("weights", "pool"), [([1, 0, 0], "arithmetic"), ([0, 1, 0], "posterior"), ([1.5, -0.5, 0.5], "geometric")]
)
def test_a_request_chooses_its_mixture(weights, pool, server, mixture):
    extra = {"ensemble_weights": weights, "ensemble_pool": pool}
    body = {"vllm_xargs": extra, "logprobs": 3, "temperature": 0, "return_token_ids": True}
    choice = complete(server, **body)["choices"][0]
    prompt, ids = choice["prompt_token_ids"], choice["token_ids"]
    present = {name: weight for name, weight in zip(WEIGHTS, weights, strict=True) if weight}
    expected = mixture(prompt + ids, present, pool)[len(prompt) - 1 : -1]
    assert ids == expected.argmax(-1).tolist()
    told = expected[range(len(ids)), ids]
    assert np.abs(np.array(choice["logprobs"]["token_logprobs"]) - told).max() < TOLERANCE_NATS


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"ensemble_weight": [1, 1, 1]}, "did you mean 'ensemble_weights'"),
        ({"ensemble_weights": [1, 1]}, "must have 3 numbers, one per member (llama, deep, qwen), got 2"),
        ({"ensemble_weights": [1, -1, 1]}, "takes no negative weight; 'deep' has -1"),
        ({"ensemble_pool": "median"}, "must be one of arithmetic, geometric, posterior"),
    ],
)
def test_nonsense_is_a_bad_request(extra, message, server):
    answer = server.post("/v1/completions", json={"model": "mix", "prompt": TEXT, "vllm_xargs": extra})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "penalties",
    [{"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.4}, {"logit_bias": {"17": 6.0}}],
    ids=lambda penalties: next(iter(penalties)),
)
def test_penalties_and_bias_act_on_the_mixture(penalties, server, mixture):
    choice = complete(server, temperature=0, return_token_ids=True, max_tokens=12, **penalties)["choices"][0]
    ids = list(choice["prompt_token_ids"])
    for token in choice["token_ids"]:
        logits = mixture(ids)[-1].copy()
        said = np.bincount(ids[len(choice["prompt_token_ids"]) :], minlength=VOCAB_SIZE)
        logits -= penalties.get("frequency_penalty", 0) * said + penalties.get("presence_penalty", 0) * (said > 0)
        logits[list(set(ids))] *= penalties.get("repetition_penalty", 1)  # log-probabilities are below 0
        logits[17] += penalties.get("logit_bias", {}).get("17", 0)
        assert logits.max() - logits[token] < TOLERANCE_NATS
        ids.append(token)


def test_a_stop_string_ends_the_text(server):
    whole = complete(server, temperature=0, max_tokens=20)["choices"][0]["text"]
    stop = whole[4:6]
    choice = complete(server, temperature=0, max_tokens=20, stop=[stop])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole[: whole.index(stop)]


def test_seeds_repeat_and_choices_differ(server):
    body = {"n": 3, "seed": 7, "temperature": 1.0}
    first, second = (sorted(c["text"] for c in complete(server, **body)["choices"]) for _ in range(2))
    assert first == second
    assert len(set(first)) > 1
    assert first != sorted(c["text"] for c in complete(server, **body | {"seed": 8})["choices"])


def test_a_stream_adds_up_to_the_answer(server):
    whole = chat(server, temperature=0, logprobs=True, top_logprobs=2)
    body = {"model": "mix", "messages": CHAT, "max_tokens": 12, "temperature": 0, "stream": True}
    body |= {"logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}}
    text, tokens, usage = "", [], None
    with server.stream("POST", "/v1/chat/completions", json=body) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                tokens += (choice.get("logprobs") or {}).get("content") or []
    assert text == whole["choices"][0]["message"]["content"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [usage[count] for count in counts] == [whole["usage"][count] for count in counts]
    expected = whole["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == [token["token"] for token in expected]
    assert [token["logprob"] for token in tokens] == pytest.approx([token["logprob"] for token in expected], abs=1e-4)


def test_structured_output_is_what_was_asked_for(server):
    regex = complete(server, structured_outputs={"regex": r"[0-9]{3}-[ab]{2}"}, max_tokens=30)["choices"][0]["text"]
    assert re.fullmatch(r"[0-9]{3}-[ab]{2}", regex)
    assert complete(server, structured_outputs={"choice": ["red", "blue"]})["choices"][0]["text"] in ("red", "blue")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "is_big": {"type": "boolean"}},
        "required": ["colour", "is_big"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    answer = json.loads(chat(server, response_format=wanted, max_tokens=100)["choices"][0]["message"]["content"])
    assert set(answer) == {"colour", "is_big"}
