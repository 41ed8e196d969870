"""What the teacher answers to prompts, asked as the rows of a batch are: each is on disk as soon as it is there.

The job and its answers lie in the cache, in a folder named after all that decides them: the teacher, the prompts, how
it is asked. A run that was killed asks only what has no answer yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.batch.notebook import run_batch
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.compare.kept.content_cache import digest
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.fingerprints import fingerprint
from ensemble_server.server.distill.chats import Prompt
from ensemble_server.server.distill.listener import Listener

if TYPE_CHECKING:
    from ensemble_server.server.batch.running.runner import Progress

ANSWERS_FILE = "answers.jsonl"
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Answer:
    """`text`: without thoughts. `is_whole`: the model ended it; a limit cut it off otherwise."""

    text: str
    is_whole: bool


def answers_to(
    prompts: Sequence[Prompt], config: Config, wanted: Distillation, *, cache: Path, listener: Listener
) -> list[Answer | None]:
    """One for each prompt, from `cache` as far as they are there; None where the prompt itself cannot be answered (it
    is too long for a member, say), or where nothing is said. Blocks; runs an event loop of its own.

    Raises `ConfigError` if answers are missing for another reason: the same call asks for those again. And what
    `run_batch` raises.
    """
    parameters = _parameters(config, wanted)
    rows = [{"custom_id": str(place), "body": {"messages": list(prompt.asked)}} for place, prompt in enumerate(prompts)]
    key = digest(
        {
            "teacher": [identity(config, wanted.ensemble), fingerprint(wanted.ensemble, config)],
            "rows": rows,
            "parameters": parameters,
            "seed": wanted.seed,
        }
    )
    file = cache / "teachers" / f"answers-{key}" / ANSWERS_FILE
    lines = _lines(file)
    if len(lines) != len(prompts) or not all(map(_is_settled, lines)):
        listener.stage(f"{wanted.ensemble} answers {len(prompts)} prompts")

        def on_progress(progress: Progress) -> None:
            listener.progress(progress.counts.ok + progress.counts.failed, progress.counts.total)

        file.parent.mkdir(parents=True, exist_ok=True)
        run_batch(
            config,
            rows,
            file,
            model=wanted.ensemble,
            seed=wanted.seed,
            retry_errors=True,
            on_progress=on_progress,
            **parameters,
        )
        lines = _lines(file)
    if missing := [(prompt, line) for prompt, line in zip(prompts, lines, strict=True) if not _is_settled(line)]:
        told = "; ".join(f"{prompt.place}: {line['error']['message']}" for prompt, line in missing[:_NUM_SHOWN])
        raise ConfigError(
            f"chat: {wanted.ensemble!r} left {len(missing)} of {len(prompts)} prompts without an answer ({told}); what "
            "it answered is kept, and the same command asks for the others again"
        )
    return [_answer(line) for line in lines]


def _parameters(config: Config, wanted: Distillation) -> dict[str, Any]:
    """A probability average answers greedily; what a vote or an exchange draws its samples at is its own affair."""
    temperature = wanted.temperature
    if temperature is None and isinstance(config.models[wanted.ensemble], ProbabilityAverage.Config):
        temperature = 0.0
    return {"max_tokens": wanted.answer_tokens} | ({} if temperature is None else {"temperature": temperature})


def _lines(file: Path) -> list[dict[str, Any]]:
    """Of the output of a batch; none if there is no output, or it cannot be read."""
    try:
        return [orjson.loads(line) for line in file.read_bytes().splitlines()]
    except (OSError, ValueError):
        return []


def _is_settled(line: Mapping[str, Any]) -> bool:
    """Whether asking again would give the same: there is an answer, or the prompt is at fault."""
    return line["response"] is not None and line["response"]["status_code"] < 500


def _answer(line: Mapping[str, Any]) -> Answer | None:
    if line["error"] is not None:
        return None
    choice = line["response"]["body"]["choices"][0]
    text = choice["message"]["content"]
    return Answer(text, choice["finish_reason"] == "stop") if text and text.strip() else None
