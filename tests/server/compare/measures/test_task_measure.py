"""Tasks on real tiny models: what counts, what fails, what repeats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ensemble_server.ensembles.errors import EngineDeadError, MemberError, OverloadedError, UnsupportedError
from ensemble_server.server.compare.measures.choice_likelihood import option_logprobs
from ensemble_server.server.compare.measures.task_measure import Item, ItemScore, Task, measure_task, pass_at_k
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting

ITEMS = tuple(Item(f"i{n}", f"The quick brown fox {n}", ("dog",)) for n in range(4))


def config_of(tiny: dict[str, Path]):
    models = {
        "llama": {"path": str(tiny["llama"]), "dtype": "float32"},
        "red": {"base": "llama", "adapter": str(tiny["red"])},
        "polite": {"base": "llama", "system_prompt": "Be polite."},
        "mix": {"method": "probability_average", "members": ["llama", "red"]},
        "views": {"method": "probability_average", "members": ["llama", "polite"]},
        "crowd": {"method": "crowd_vote", "members": ["llama", "red"], "similarity": "rouge_l_word"},
    }
    return parse_config({"models": models}, source=Path("config.yaml"))


def right_answer_of(outputs: list[ItemScore]) -> tuple[Item, ...]:
    return tuple(Item(item.id, item.prompt, (score.outputs[0],)) for item, score in zip(ITEMS, outputs, strict=True))


@pytest.mark.parametrize("name", ["llama", "mix", "crowd"])
async def test_any_model_can_be_asked_and_its_outputs_are_judged(tiny, name) -> None:
    task = Task("t", ITEMS, "rouge_l", is_chat=False, max_tokens=6)
    async with Hosting.open(config_of(tiny)) as hosting:
        first = await measure_task(hosting, name, task)
        assert [score.id for score in first] == ["i0", "i1", "i2", "i3"]
        assert all(score.score < 1 and score.error is None for score in first)
        again = Task("t", right_answer_of(first), "rouge_l", is_chat=False, max_tokens=6)
        second = await measure_task(hosting, name, again, concurrency=1)
    assert [score.score for score in second] == [1.0] * 4
    assert [score.prompt_sha256 for score in second] == [score.prompt_sha256 for score in first]
    assert len({score.prompt_sha256 for score in first}) == 4


async def test_samples_differ_and_repeat_with_their_seed(tiny) -> None:
    task = Task("t", ITEMS, "rouge_l", num_samples=3, max_tokens=5, temperature=1.0)
    async with Hosting.open(config_of(tiny)) as hosting:
        heard: list[ItemScore] = []
        runs = [await measure_task(hosting, "llama", task, seed=seed, on_item=heard.append) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert all(len(set(score.outputs)) > 1 for score in runs[0])
    assert len(heard) == 12
    for score in runs[0]:
        assert score.score == pytest.approx(np.mean(score.sample_scores))
        assert score.completion_tokens <= 15


class Moody:
    """Answers nothing: raises what it is told, item by item."""

    name, members, max_model_len = "moody", ("moody",), None
    explains_tokens, fan_out = True, 1

    def __init__(self, inner, errors: list[Exception | None]) -> None:
        self._inner, self._errors = inner, errors

    async def generate(self, request):
        error = self._errors.pop(0)
        if error is not None:
            raise error
        async for event in self._inner.generate(request):
            yield event


async def asked(tiny, task: Task, errors: list[Exception | None]) -> list[ItemScore]:
    async with Hosting.open(config_of(tiny)) as hosting:
        hosting.models["moody"] = Moody(hosting.models["llama"], errors)
        return await measure_task(hosting, "moody", task, concurrency=1)


async def test_an_item_that_fails_counts_as_wrong_and_the_others_go_on(tiny) -> None:
    task = Task("t", ITEMS, "rouge_l", num_samples=2, max_tokens=3)
    scores = await asked(tiny, task, [None, None, MemberError("llama", "fell over"), *[None] * 5])
    assert [score.error for score in scores] == [None, "member 'llama': fell over", None, None]
    assert (scores[1].outputs[0], scores[1].answers[0], scores[1].sample_scores[0]) == ("", None, 0.0)
    assert scores[1].outputs[1] != ""


async def test_a_full_queue_is_waited_for(tiny) -> None:
    task = Task("t", ITEMS[:1], "rouge_l", max_tokens=3)
    (score,) = await asked(tiny, task, [OverloadedError("full", retry_after_s=0.01)] * 2 + [None])
    assert score.error is None


@pytest.mark.parametrize("error", [UnsupportedError("never"), EngineDeadError("gone")])
async def test_what_no_item_can_survive_is_raised(tiny, error) -> None:
    with pytest.raises(type(error), match=str(error)):
        await asked(tiny, Task("t", ITEMS, "rouge_l", max_tokens=3), [None, error])


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("name", ["red", "mix"])
async def test_the_most_likely_option_is_chosen(tiny, is_chat, name) -> None:
    """Against a slow reference: the summed log-probabilities by transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    choices = ("fox", "lazy dog", "12.5", "to be, or not")
    items = tuple(Item(f"i{n}", f"The quick brown {n}", (choices[0],), choices) for n in range(3))
    async with Hosting.open(config_of(tiny)) as hosting:
        task = Task("t", items, "multiple_choice", is_chat=is_chat)
        per_byte = Task("t", items, "multiple_choice_per_byte", is_chat=is_chat)
        scores = await measure_task(hosting, name, task)
        normalised = await measure_task(hosting, name, per_byte)
        surface = hosting.surface("llama")
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float32).eval()
    expert = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float32), tiny["red"]
    ).eval()

    @torch.inference_mode()
    def probs(ids: list[int]) -> torch.Tensor:
        parts = [expert] if name == "red" else [base, expert]
        rows = [model(torch.tensor([ids])).logits[0, :, :320].double().softmax(-1) for model in parts]
        return torch.stack(rows).mean(0).log()

    for item, score, of_bytes in zip(items, scores, normalised, strict=True):
        if is_chat:
            context = surface.render([{"role": "user", "content": item.prompt}])
            options = [surface.encode(choice) for choice in choices]
        else:
            context = surface.encode(item.prompt)
            options = [surface.encode(" " + choice) for choice in choices]
        nats = [
            sum(float(probs(context + ids)[len(context) + n - 1, token]) for n, token in enumerate(ids))
            for ids in options
        ]
        assert list(json.loads(score.outputs[0]).values()) == pytest.approx(nats, rel=1e-3)
        assert score.answers == (choices[int(np.argmax(nats))],)
        assert score.score == float(score.answers[0] == "fox")
        assert of_bytes.answers == (choices[int(np.argmax([n / len(c) for n, c in zip(nats, choices, strict=True)]))],)


async def test_an_option_is_scored_from_where_its_tokens_part_from_the_prompts(tiny) -> None:
    """The tokenizer joins "ov" and "er" over the border: "over" must not be scored as if the prompt ended in "ov"."""
    async with Hosting.open(config_of(tiny)) as hosting:
        (nats,) = await option_logprobs(hosting, "llama", "jumps ", ("over",))
        (with_blank,) = await option_logprobs(hosting, "llama", "jumps", ("over",))
    assert nats == pytest.approx(with_blank, rel=1e-5)  # both are the tokens of "jumps over" after "jumps"


async def test_models_that_cannot_score_options_say_so(tiny) -> None:
    task = Task("t", (Item("a", "fox", ("x",), ("x", "y")),), "multiple_choice")
    async with Hosting.open(config_of(tiny)) as hosting:
        with pytest.raises(UnsupportedError, match="gives text, not probabilities"):
            await measure_task(hosting, "crowd", task)
        with pytest.raises(UnsupportedError, match="different views"):
            await measure_task(hosting, "views", task)


def test_pass_at_k_is_the_mean_over_items() -> None:
    def item(*scores: float) -> ItemScore:
        return ItemScore("x", 0.0, ("",) * len(scores), (None,) * len(scores), scores, "", "")

    scores = [item(1, 0, 0, 0), item(0, 0, 0, 0), item(1, 1, 1, 0.5)]
    assert pass_at_k(scores, 1) == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert pass_at_k(scores, 2) == pytest.approx((1 / 2 + 0 + 1) / 3)
