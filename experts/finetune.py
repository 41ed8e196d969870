"""Trains a LoRA adapter of Qwen2.5-Coder-0.5B-Instruct to answer word problems, on the CPU.

    python experts/finetune.py math
    python experts/finetune.py options

`math` answers with the short rationale of the data and the number in \\boxed{}; `options` is asked the same kind of
question with five options, of other rows, and answers with the letter. Both are asked in the words of
`configs/tasks/`. Loss is on the answer alone. The rows are of GSM8K's training part, no test questions among them
(`data/tasks/gsm8k_train_short.jsonl`): `math` has those at even places, `options` those at odd ones, with options made
here from the numbers of the rationale.

What is adapted is the upper half of the layers: the lower half then needs no backward pass. A checkpoint beside `--out`
is written every ten steps; the same command goes on from it. AdamW, linear warm-up, cosine decay. LoRA:
https://arxiv.org/abs/2106.09685, by PEFT; written as float16.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensemble_server.server.distill.schedule import batches_of, learning_rate_factor
from ensemble_server.server.distill.student import save_adapter
from ensemble_server.server.weights.checkpoints import resolve_checkpoint

ROOT = Path(__file__).resolve().parent.parent
BASE = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
DATA = ROOT / "data/tasks/gsm8k_train_short.jsonl"
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_HELD_OUT = 12  # rows, for the loss before and after
CHECKPOINT_EVERY = 10  # steps


@dataclass(frozen=True)
class Example:
    """Token ids; `num_prompt` of them are the question's, and not learned."""

    ids: list[int]
    num_prompt: int


# --- data ---


def math_turns(row: dict[str, str]) -> tuple[str, str]:
    """Question and answer of a row, as configs/tasks/number.txt asks it."""
    asked = (ROOT / "configs/tasks/number.txt").read_text(encoding="utf-8").strip()
    question = asked.replace("{{ question }}", row["question"])
    return question, f"{_plain(row['rationale'])}\nThe answer is \\boxed{{{row['answer']}}}."


def options_turns(row: dict[str, str]) -> tuple[str, str]:
    """The same with five options, as configs/tasks/choice.txt asks it; which letter is right is drawn by the row."""
    asked = (ROOT / "configs/tasks/choice.txt").read_text(encoding="utf-8").strip()
    options, letter = options_of(row)
    question = asked.replace("{{ question }}", row["question"]).replace(
        '{{ options | join("\\n") }}', "\n".join(options)
    )
    return question, f"{_plain(row['rationale'])}\nThe answer is \\boxed{{{letter}}}."


def options_of(row: dict[str, str]) -> tuple[list[str], str]:
    """Five options, `A)…` to `E)…`, and the right letter. Wrong: numbers of question and rationale, then near ones."""
    draw = random.Random(row["id"])
    right = row["answer"].replace(",", "")
    seen = [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", row["question"] + row["rationale"])]
    wrong = [number for number in dict.fromkeys(seen) if float(number) != float(right)]
    draw.shuffle(wrong)
    value = float(right)
    near = [f"{miss:g}" for miss in (value + 1, value * 2, value + 10, value + 5, value * 3) if miss != value]
    chosen = list(dict.fromkeys([*wrong[:3], *near]))[:4]
    options = [right, *chosen]
    draw.shuffle(options)
    letters = "ABCDE"
    return [f"{letter}){option}" for letter, option in zip(letters, options, strict=True)], letters[
        options.index(right)
    ]


def _plain(rationale: str) -> str:
    return re.sub(r"<<[^>]*>>", "", rationale)


KINDS = {"math": math_turns, "options": options_turns}


def examples_of(kind: str, tokenizer, max_tokens: int) -> list[Example]:
    """Those that are no longer than `max_tokens`, in the data's order."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    examples = []
    for row in rows[list(KINDS).index(kind) :: len(KINDS)]:
        question, answer = KINDS[kind](row)
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = prompt_ids + tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        if len(ids) <= max_tokens:
            examples.append(Example(ids, len(prompt_ids)))
    return examples


# --- training ---


def loss_of(model, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens, in nats. The output head reads their places alone."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    is_read, is_answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        is_read[row, : len(example.ids)] = 1
        is_answer[row, example.num_prompt : len(example.ids)] = True
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(input_ids=ids, attention_mask=is_read, use_cache=False).last_hidden_state
    logits = causal_lm.lm_head(hidden[:, :-1][is_answer[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][is_answer[:, 1:]])


@torch.no_grad()
def held_out_loss(model, examples: Sequence[Example]) -> float:
    model.eval()
    return float(loss_of(model, examples))


def train(model, examples: Sequence[Example], settings: argparse.Namespace, checkpoint: Path) -> tuple[float, int]:
    """In place. Returns seconds and tokens, those before an interruption included."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.learning_rate, weight_decay=0.0)
    first, seconds, num_tokens = 0, 0.0, 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        optimizer.load_state_dict(kept["optimizer"])
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept["weights"][name])
        first, seconds, num_tokens = kept["step"], kept["seconds"], kept["num_tokens"]
        print(f"goes on at step {first}", flush=True)
    model.train()
    order = islice(batches_of(len(examples), settings.batch_size, seed=settings.seed), first, settings.steps)
    for step, indices in enumerate(order, start=first):
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, settings.steps)
        batch = [examples[index] for index in indices]
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.monotonic() - began
        num_tokens += sum(len(example.ids) for example in batch)
        print(f"step {step + 1}/{settings.steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {"weights": weights, "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "seconds": seconds, "num_tokens": num_tokens}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return seconds, num_tokens


def main() -> None:
    settings = parse_arguments()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    folder = resolve_checkpoint(settings.base, relative_to=Path.cwd())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = examples_of(settings.kind, tokenizer, settings.max_tokens)
    held_out, examples = examples[:NUM_HELD_OUT], examples[NUM_HELD_OUT:]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_layers = base.config.num_hidden_layers
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=TARGET_MODULES,
        layers_to_transform=list(range(num_layers // 2, num_layers)),
    )
    model = get_peft_model(base, lora)
    before = held_out_loss(model, held_out)
    print(f"{len(examples)} examples, held-out loss {before:.3f}", flush=True)
    out = settings.out or ROOT / "experts" / f"qwen-{settings.kind}"
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f".{out.name}.pt")
    seconds, num_tokens = train(model, examples, settings, checkpoint)
    after = held_out_loss(model, held_out)
    num_bytes = save_adapter(model, out, base=BASE)
    checkpoint.unlink(missing_ok=True)
    print(
        f"{settings.kind}: {settings.steps} steps of {settings.batch_size} on {num_tokens} tokens in "
        f"{seconds / 60:.1f} min; held-out loss {before:.3f} -> {after:.3f}; {num_bytes / 1e6:.2f} MB in {out}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a LoRA adapter that answers word problems.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--base", default=BASE, help="hub id, folder or .gguf file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4, help="questions per step")
    parser.add_argument("--max-tokens", type=int, default=160, help="longer questions with answers are left out")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16, help="the adapter is scaled by alpha / rank")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="peak, after the warm-up")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start values and the order of questions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder to write; default experts/qwen-KIND")
    return parser.parse_args()


if __name__ == "__main__":
    main()
