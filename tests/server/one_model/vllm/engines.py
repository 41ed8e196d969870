"""vLLM engines in this process on tiny exported ensembles, and what the independent reference says of their output."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.one_model.export import export
from tests.conftest import WIDE, make_adapter, make_model
from tests.reference import Reference

VOCAB_SIZE = 320
TOLERANCE_NATS = 1e-3
TEXTS = (
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "To be, or",
    "def f(x): return x + 1\n" * 3,
    "a",
    '{"key": 12.5, "true": [false, {}]} Ünïcödé 数学 😀 question. To be, or not to be, that is',
    "The",
)
# What vLLM's attention kernels for CPUs take: heads of 32.


def make_members(root: Path) -> dict[str, Path]:
    """Models of one vocabulary that differ in family, depth, width, heads and padding, and adapters of `llama`."""
    gpt2 = {"n_embd": 64, "n_head": 2}
    folders = {
        "llama": make_model(root / "llama", **WIDE),
        "twin": make_model(root / "twin", seed=5, **WIDE),
        "deep": make_model(
            root / "deep",
            seed=1,
            vocab_size=384,
            **WIDE | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 96},
        ),
        "tight": make_model(root / "tight", seed=6, vocab_size=VOCAB_SIZE, **WIDE),
        "qwen": make_model(root / "qwen", "qwen3", seed=2, **WIDE),
        "gpt2": make_model(root / "gpt2", "gpt2", seed=3, **gpt2),
        "gemma": make_model(root / "gemma", "gemma3_text", seed=4, **WIDE),
    }
    for seed, name in enumerate(("red", "green"), start=10):
        folders[name] = make_adapter(root / name, folders["llama"], seed=seed)
    return folders


def exported(members: Mapping[str, Path], folder: Path, /, **mixture: Any) -> Path:
    """`ensemble export` of a probability average of `members` into `folder`."""
    adapters = {name for name in members if (members[name] / "adapter_config.json").is_file()}
    models: dict[str, Any] = {name: {"path": str(members[name])} for name in members if name not in adapters}
    models |= {name: {"base": "llama", "adapter": str(members[name])} for name in adapters}
    models["mix"] = {"method": "probability_average", **mixture}
    export(parse_config({"models": models}, source=folder.parent / "c.yaml"), "mix", folder)
    return folder


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Any]:
    """A vLLM `LLM` of `folder`: prompts read in chunks of 32 tokens, four requests at a time, blocks of 32 tokens."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    small = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": 32,
    }
    llm = LLM(str(folder), gpu_memory_utilization=0.1, **small | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def run(llm: Any, texts: Sequence[str] = TEXTS, *, extra_args: Any = None, **params: Any) -> list[Any]:
    """One batch of greedy requests with log-probabilities. extra_args: for all, or one per text."""
    from vllm import SamplingParams

    each = extra_args if isinstance(extra_args, list) else [extra_args] * len(texts)
    settings = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 4, "prompt_logprobs": 2} | params
    return llm.generate(list(texts), [SamplingParams(**settings, extra_args=extra) for extra in each], use_tqdm=False)


def reference_of(members: Mapping[str, Path]) -> Reference:
    adapters = {name for name in members if (members[name] / "adapter_config.json").is_file()}
    places = {name: (folder, None) for name, folder in members.items() if name not in adapters}
    return Reference(places | {name: (members["llama"], members[name]) for name in adapters}, VOCAB_SIZE)


class Judge:
    """Holds outputs to members that plain transformers ran alone."""

    def __init__(self, members: Mapping[str, Path], reference: Callable[..., Any] | None = None) -> None:
        """reference: in place of plain transformers on the members' folders."""
        self._reference = reference or reference_of(members)

    def __call__(
        self,
        output: Any,
        weights: Mapping[str, float],
        pool: str = "arithmetic",
        share: float = 0.0,
        tolerance: float = TOLERANCE_NATS,
    ) -> float:
        """The largest difference, nats, of any log-probability in `output`; fails if a greedy token is another one
        and no tie. weights: by member, none zero.
        """
        prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        expected, _ = self._reference(pool, weights, prompt + answer, share)
        worst = 0.0
        for position, found in enumerate(output.prompt_logprobs or [None]):
            for token, entry in (found or {}).items():
                worst = max(worst, abs(entry.logprob - expected[position - 1, token]))
        for step, found in enumerate(output.outputs[0].logprobs or []):
            after = expected[len(prompt) - 1 + step]
            gap = after.max() - after[answer[step]]
            assert gap < tolerance, f"token {step} is {gap:.4f} nats behind the best"
            for token, entry in found.items():
                worst = max(worst, abs(entry.logprob - after[token]))
        return float(worst)


def logprobs_of(output: Any) -> np.ndarray:
    """(T,): of the generated tokens."""
    choice = output.outputs[0]
    return np.array([found[token].logprob for token, found in zip(choice.token_ids, choice.logprobs, strict=True)])
