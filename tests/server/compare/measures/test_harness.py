"""lm-evaluation-harness over models hosted in this process, with tasks of a few rows."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest

from ensemble_server.ensembles.base import GenerationRequest, Sampling, collect
from ensemble_server.ensembles.errors import ConfigError, MemberError, UnsupportedError
from ensemble_server.server.compare.measures.choice_likelihood import option_logprobs
from ensemble_server.server.compare.measures.harness import run_harness
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting

ROWS = [
    {"question": "The quick brown", "options": ["fox jumps", "dog"], "label": 0, "answer": "fox"},
    {"question": "To be, or not", "options": ["to be", "the question", "x + 1"], "label": 0, "answer": "to be"},
    {"question": "def f(x): return", "options": ["x + 1", "true"], "label": 1, "answer": "x"},
]
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = (
    HEAD
    + """
output_type: multiple_choice
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
)
TASKS = {
    "tiny_choice": CHOICE,
    "tiny_choice_again": CHOICE,
    "tiny_generation": HEAD
    + """
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
""",
    "tiny_beams": HEAD
    + """
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, num_beams: 4}}
metric_list: [{{metric: exact_match}}]
""",
    "tiny_perplexity": HEAD
    + """
output_type: loglikelihood_rolling
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, template in TASKS.items():
        (root / f"{name}.yaml").write_text(template.format(name=name, rows=rows))
    for name, tasks in {
        "tiny_group": "tiny_choice, tiny_choice_again",
        "odd_group": "tiny_choice, tiny_generation",
    }.items():
        (root / f"{name}.yaml").write_text(f"group: {name}\ntask: [{tasks}]\n")
    return root


def config_of(tiny: dict[str, Path]):
    models = {
        "llama": {"path": str(tiny["llama"]), "dtype": "float32"},
        "red": {"base": "llama", "adapter": str(tiny["red"])},
        "mix": {"method": "probability_average", "members": ["llama", "red"]},
        "crowd": {"method": "crowd_vote", "members": ["llama", "red"], "similarity": "rouge_l_word"},
    }
    return parse_config({"models": models}, source=Path("config.yaml"))


async def test_likelihoods_and_generations_come_from_the_hosted_mixture(tiny, folder) -> None:
    heard: list[tuple[int, int]] = []
    async with Hosting.open(config_of(tiny)) as hosting:
        found = await run_harness(
            hosting,
            "mix",
            ["tiny_choice", "tiny_generation"],
            include_path=folder,
            on_progress=lambda *n: heard.append(n),
        )
        for row, item in zip(ROWS, found["tiny_choice"].items, strict=True):
            nats = await option_logprobs(hosting, "mix", row["question"], tuple(row["options"]))
            assert [pair[0] for pair in map(json.loads, item.outputs)] == pytest.approx(nats, rel=1e-4)
            assert item.score == float(nats.index(max(nats)) == row["label"])
        for row, item in zip(ROWS, found["tiny_generation"].items, strict=True):
            request = GenerationRequest(
                prompt=row["question"], sampling=Sampling(max_tokens=8, temperature=0, stop=("\n",))
            )
            text = (await collect(hosting.models["mix"], request)).text
            assert item.outputs == (text,)
            assert item.reference == row["answer"]
    assert found["tiny_choice"].metric == "acc,none"
    assert found["tiny_choice"].metrics["acc,none"] == pytest.approx(
        sum(item.score for item in found["tiny_choice"].items) / 3
    )
    assert found["tiny_choice"].higher_is_better
    assert len({item.prompt_sha256 for item in found["tiny_choice"].items}) == 3
    assert heard[-1] == (10, 10)  # 2 + 3 + 2 options and 3 generations


async def test_rolling_likelihoods_cover_every_token_even_beyond_the_context(tiny, folder, monkeypatch) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        found = await run_harness(hosting, "red", ["tiny_perplexity"], include_path=folder)
        monkeypatch.setattr(hosting.models["red"], "max_model_len", 6)
        in_windows = await run_harness(hosting, "red", ["tiny_perplexity"], include_path=folder)
        surface = hosting.surface("red")
        nats = 0.0
        for row in ROWS:
            ids = (surface.tokenizer.bos_token_id, *surface.encode(row["question"]))
            request = GenerationRequest(prompt=ids, prompt_logprobs=0, sampling=Sampling(max_tokens=0))
            nats += sum(token.logprob for token in (await collect(hosting.models["red"], request)).prompt.tokens[1:])
    size = sum(len(row["question"].encode()) for row in ROWS)
    assert (found["tiny_perplexity"].metric, found["tiny_perplexity"].items) == ("bits_per_byte,none", ())
    assert not found["tiny_perplexity"].higher_is_better
    assert found["tiny_perplexity"].metrics["bits_per_byte,none"] == pytest.approx(-nats / math.log(2) / size, rel=1e-4)
    assert in_windows["tiny_perplexity"].metrics != found["tiny_perplexity"].metrics


async def test_text_level_ensembles_generate_but_give_no_likelihoods(tiny, folder) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        found = await run_harness(hosting, "crowd", ["tiny_generation"], include_path=folder)
        assert len(found["tiny_generation"].items) == 3
        with pytest.raises(UnsupportedError, match="gives text, not probabilities"):
            await run_harness(hosting, "crowd", ["tiny_choice"], include_path=folder)


async def test_a_group_has_the_items_of_all_its_tasks(tiny, folder) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        found = await run_harness(hosting, "llama", ["tiny_group"], include_path=folder, limit=2)
        with pytest.raises(ConfigError, match="different metrics"):
            await run_harness(hosting, "llama", ["odd_group"], include_path=folder, limit=2)
    ids = [item.id for item in found["tiny_group"].items]
    assert ids == ["tiny_choice/0", "tiny_choice/1", "tiny_choice_again/0", "tiny_choice_again/1"]


async def test_a_generation_that_fails_counts_as_wrong(tiny, folder, monkeypatch) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        model = hosting.models["llama"]
        generate = model.generate

        def moody(request):
            if request.prompt == ROWS[1]["question"]:
                raise MemberError("llama", "fell over")
            return generate(request)

        monkeypatch.setattr(model, "generate", moody)
        found = await run_harness(hosting, "llama", ["tiny_generation"], include_path=folder)
    items = found["tiny_generation"].items
    assert [item.error for item in items] == [None, "member 'llama': fell over", None]
    assert (items[1].score, items[1].outputs) == (0.0, ("",))


async def test_what_the_harness_cannot_do_is_said(tiny, folder) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        with pytest.raises(UnsupportedError, match=r"generation_kwargs\.num_beams"):
            await run_harness(hosting, "llama", ["tiny_beams"], include_path=folder)


async def test_cancelling_stops_the_harness(tiny, folder) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        begun = asyncio.Event()
        task = asyncio.ensure_future(
            run_harness(
                hosting, "mix", ["tiny_choice"], include_path=folder, concurrency=1, on_progress=lambda *_: begun.set()
            )
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = await run_harness(hosting, "mix", ["tiny_generation"], include_path=folder)
    assert len(found["tiny_generation"].items) == 3


@pytest.mark.slow  # looks through the harness's own tasks
async def test_an_unknown_task_is_named(tiny, folder) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        with pytest.raises(ConfigError, match="no task 'tiny_choise'; did you mean 'tiny_choice'"):
            await run_harness(hosting, "llama", ["tiny_choise"], include_path=folder)
