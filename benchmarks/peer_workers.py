"""One engine of `benchmarks.peers` in a process, and an interpreter, of its own.

A worker is told what to load on its command line, says what it is in one line of JSON, and then answers lines: for
token ids of prompts that are of one length, and a number of new tokens, how long it took to read the prompts (until all
streams had their first token) and to write the rest. Whatever libraries print goes to the error output.

Nothing is imported here but the standard library: an interpreter that has only llama.cpp can run it, too.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

NUM_LIKELIEST = 20
PREFILL_CHUNK = 512  # tokens that are read in one step; the engine's default, and llama.cpp's

Tokens = list[list[int]]  # of each stream
Likeliest = list[tuple[int, float]]  # token and log-probability, best first


class Engine(Protocol):
    """`about`: what it is, with versions."""

    about: str

    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, all_read: Callable[[], None], likeliest: bool
    ) -> tuple[Tokens, Likeliest]:
        """Greedily `num_tokens` behind each of `prompts`, which are as long as one another; calls `all_read` once each
        has its first token. `likeliest`: of the first token of the first stream, else nothing."""
        ...


class Missing(Exception):
    """This interpreter, or machine, cannot run the engine; the text says why."""


@dataclass
class Clock:
    """Seconds since it was made, in all and of this process's CPU, at each call."""

    wall: list[float] = field(default_factory=lambda: [time.perf_counter()])
    cpu: list[float] = field(default_factory=lambda: [time.process_time()])

    def __call__(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def phase(self, number: int) -> dict[str, float]:
        return {
            "wall_s": self.wall[number + 1] - self.wall[number],
            "cpu_s": self.cpu[number + 1] - self.cpu[number],
        }


class PlainLoop:
    """What people write today: the model's own forward and cache, argmax, the next step. All streams in one batch."""

    def __init__(self, *, checkpoint: str, dtype: str, device: str) -> None:
        import torch
        import transformers

        self.torch = torch
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.to(place).eval()
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}, {dtype}, {place}"

    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, all_read: Callable[[], None], likeliest: bool
    ) -> tuple[Tokens, Likeliest]:
        torch, cache, first = self.torch, None, []
        step = torch.tensor([list(prompt) for prompt in prompts], device=self.model.device)
        written: Tokens = [[] for _ in prompts]
        with torch.no_grad():
            for place in range(num_tokens):
                output = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                logits = output.logits[:, -1]
                step = logits.argmax(-1, keepdim=True)
                for tokens, token in zip(written, step[:, 0].tolist(), strict=True):
                    tokens.append(token)
                if place == 0:
                    all_read()
                    if likeliest:
                        best = torch.log_softmax(logits[0].float(), -1).topk(NUM_LIKELIEST)
                        first = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return written, first


class Ours:
    """The embedded engine. `weights`: as `engine.weights` in a config."""

    def __init__(self, *, checkpoint: str, dtype: str, device: str, weights: Any, num_streams: int) -> None:
        from benchmarks.subjects import load_as_in_use
        from ensemble_server.ensembles.base import Mixture
        from ensemble_server.server.config.blocks import HostedModel
        from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
        from ensemble_server.server.weights.threads import in_own_thread

        models = {"base": HostedModel.model_validate({"path": checkpoint, "dtype": dtype, "device": device})}
        members = asyncio.run(in_own_thread(load_as_in_use, models, max_context=2048, weights=weights))
        self.mixture = Mixture({"base": 1.0})
        self.engine = TransformersEngine(
            members, max_batch=num_streams, prefill_chunk=PREFILL_CHUNK, prefix_cache_bytes=0
        )
        self.engine.start()
        self.about = f"{dtype}, weights: {weights}, {members['base'].backbone.device}"

    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, all_read: Callable[[], None], likeliest: bool
    ) -> tuple[Tokens, Likeliest]:
        from ensemble_server.ensembles.base import Delta, GenerationRequest, Sampling

        sampling = Sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        written: Tokens = [[] for _ in prompts]
        first: Likeliest = []
        waiting = set(range(len(prompts)))

        async def one(index: int) -> None:
            request = GenerationRequest(
                prompt=tuple(prompts[index]),
                sampling=sampling,
                top_logprobs=NUM_LIKELIEST if likeliest and index == 0 else None,
            )
            async for event in self.engine.generate(self.mixture, request, method="benchmark"):
                if not isinstance(event, Delta) or not event.token_ids:
                    continue
                if event.tokens and not first:
                    first.extend((token.token_id, token.logprob or 0.0) for token in event.tokens[0].top)
                written[index] += event.token_ids
                if index in waiting:
                    waiting.discard(index)
                    if not waiting:
                        all_read()

        async def together() -> None:
            await asyncio.gather(*map(one, range(len(prompts))))

        asyncio.run(together())
        return written, first

    def stop(self) -> None:
        self.engine.stop()


class LlamaCpp:
    """llama.cpp through llama-cpp-python's plain bindings: one context, one sequence for each stream."""

    def __init__(self, *, file: str, num_streams: int, num_context: int, num_threads: int, gpu: bool) -> None:
        import llama_cpp
        import numpy

        self.lib, self.numpy = llama_cpp, numpy

        @llama_cpp.llama_log_callback
        def quiet(level: int, text: bytes, data: Any) -> None:
            pass

        self._quiet = quiet  # C keeps no reference
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        wanted.n_gpu_layers = 999 if gpu else 0
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), wanted)
        if not self.model:
            raise Missing(f"llama.cpp could not load {file}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = num_context * num_streams, num_streams
        params.n_batch = params.n_ubatch = PREFILL_CHUNK
        params.n_threads = params.n_threads_batch = num_threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise Missing(f"llama.cpp could not make a context of {params.n_ctx} tokens for {file}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(PREFILL_CHUNK, 0, 1)
        self.about = f"llama-cpp-python {llama_cpp.__version__}, {num_threads} threads"

    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, all_read: Callable[[], None], likeliest: bool
    ) -> tuple[Tokens, Likeliest]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        written: Tokens = [[] for _ in prompts]
        first: Likeliest = []
        last = len(prompts[0]) - 1
        step = [(token, at, row, at == last) for row, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        for place in range(num_tokens):
            following = []
            for row, logits in self._logits(step):
                token = int(logits.argmax())
                written[row].append(token)
                following.append((token, last + 1 + place, row, True))
                if likeliest and not first:
                    first = self._likeliest(logits)
            if place == 0:
                all_read()
            step = following
        return written, first

    def _logits(self, step: Sequence[tuple[int, int, int, bool]]) -> Iterator[tuple[int, Any]]:
        """Of the tokens (id, place, stream, whether it is the last) those of which are the last, with their stream."""
        for begin in range(0, len(step), PREFILL_CHUNK):
            chunk = step[begin : begin + PREFILL_CHUNK]
            self.batch.n_tokens = len(chunk)
            for i, (token, at, row, is_last) in enumerate(chunk):
                self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, at, is_last
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
            if (code := self.lib.llama_decode(self.context, self.batch)) != 0:
                raise RuntimeError(f"llama_decode says {code}")
            for i, (_, _, row, is_last) in enumerate(chunk):
                if is_last:
                    pointer = self.lib.llama_get_logits_ith(self.context, i)
                    yield row, self.numpy.ctypeslib.as_array(pointer, (self.vocab_size,))

    def _likeliest(self, logits: Any) -> Likeliest:
        shifted = logits.astype("float64") - float(logits.max())
        logprobs = shifted - self.numpy.log(self.numpy.exp(shifted).sum())
        best = logprobs.argsort()[::-1][:NUM_LIKELIEST]
        return [(int(token), float(logprobs[token])) for token in best]


class Vllm:
    """vLLM in this process, one step after the other; eager on a CPU, where compiling takes minutes."""

    def __init__(self, *, checkpoint: str, dtype: str, num_streams: int, num_context: int, gpu: bool) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its CPU time is to be this process's
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        vllm: Any = importlib.import_module("vllm")  # not the benchmark beside this file
        self.vllm, self.num_asked = vllm, 0
        model = vllm.LLM(
            checkpoint,
            dtype=dtype,
            enforce_eager=not gpu,
            enable_prefix_caching=False,
            max_model_len=num_context,
            max_num_seqs=num_streams,
            max_num_batched_tokens=max(PREFILL_CHUNK, num_context),
            disable_log_stats=True,
            **({"gpu_memory_utilization": 0.3} if gpu else {}),
        )
        self.engine: Any = model.llm_engine
        self.about = f"vLLM {vllm.__version__}, {dtype}"

    def write(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, all_read: Callable[[], None], likeliest: bool
    ) -> tuple[Tokens, Likeliest]:
        names = {}
        for index, prompt in enumerate(prompts):
            self.num_asked += 1
            names[str(self.num_asked)] = index
            sampling = self.vllm.SamplingParams(
                temperature=0,
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=NUM_LIKELIEST if likeliest and index == 0 else None,
            )
            self.engine.add_request(str(self.num_asked), {"prompt_token_ids": list(prompt)}, sampling)
        written: Tokens = [[] for _ in prompts]
        first: Likeliest = []
        are_read = False
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                index = next((names[name] for name in names if output.request_id.split("-")[0] == name), None)
                if index is None:
                    continue
                answer = output.outputs[0]
                written[index] = list(answer.token_ids)
                if likeliest and index == 0 and not first and answer.logprobs:
                    alternatives = sorted(answer.logprobs[0].items(), key=lambda item: -item[1].logprob)
                    first = [(token, found.logprob) for token, found in alternatives[:NUM_LIKELIEST]]
            if not are_read and all(written):
                are_read = True
                all_read()
        return written, first


ENGINES: dict[str, tuple[Callable[..., Engine], str]] = {  # each with the package that it needs
    "loop": (PlainLoop, "transformers"),
    "ours": (Ours, "ensemble_server"),
    "llama.cpp": (LlamaCpp, "llama_cpp"),
    "vllm": (Vllm, "vllm"),
}


def answer(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    """`prompt` and `decode`: seconds. `written`: the tokens. `likeliest`: where it was asked for."""
    clock = Clock()
    written, likeliest = engine.write(
        question["prompts"], question["num_tokens"], clock, bool(question.get("likeliest"))
    )
    clock()
    return {"prompt": clock.phase(0), "decode": clock.phase(1), "written": written, "likeliest": likeliest}


def serve(kind: str, told: dict[str, Any], questions: TextIO, answers: TextIO) -> None:
    """Load, say so, and answer until there are no questions any more."""

    def say(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    make, _ = ENGINES[kind]
    try:
        engine = make(**told)
    except (Missing, ImportError) as exc:
        say({"missing": str(exc)})
        return
    say({"about": engine.about})
    for line in questions:
        say(answer(engine, json.loads(line)))
    if isinstance(engine, Ours):
        engine.stop()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    kind, told = sys.argv[1:]
    serve(kind, json.loads(told), sys.stdin, answers)


if __name__ == "__main__":
    main()
