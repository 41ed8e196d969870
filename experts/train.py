"""Trains one of the demo's experts: a LoRA adapter of SmolLM2-135M-Instruct on one domain's text, on the CPU.

    python experts/train.py code --seed 0
    python experts/train.py jargon --full --learning-rate 1e-4 --out jargon-full      # all weights, for docs/deltas.md

The text is tokenised once and cut into sequences of 256 tokens. The last 5% of the file is held out: settings were
chosen by the bits per byte on it, and `data/text/*_test.txt` is only read by `evaluate.py`. AdamW, a linear warm-up
and a cosine decay to zero. Adapters: LoRA (https://arxiv.org/abs/2106.09685), scaled by alpha / rank, by PEFT;
written as float16, so that each stays below 3 MB.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import islice
from pathlib import Path

import torch
from bits_per_byte import score_windows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensemble_server.server.distill.schedule import batches_of, learning_rate_factor
from ensemble_server.server.distill.student import save_adapter
from ensemble_server.server.weights.checkpoints import resolve_checkpoint

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("code", "jargon", "shakespeare")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEV_SHARE = 0.05
# Every linear layer inside the blocks; embeddings and output head stay as they are.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    settings = parse_arguments()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    text = (ROOT / f"data/text/{settings.domain}_train.txt").read_text(encoding="utf-8")
    train_text, dev_text = split_dev(text)

    checkpoint = resolve_checkpoint(BASE, relative_to=ROOT)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    base_bpb = score_windows(base, tokenizer, dev_text).bpb
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=TARGET_MODULES,
    )
    model = base if settings.full else get_peft_model(base, lora)

    started = time.monotonic()
    sequences = cut_sequences(tokenizer, train_text, settings.sequence_length)
    num_steps = train(model, sequences, settings)
    minutes = (time.monotonic() - started) / 60
    num_tokens = min(num_steps * settings.batch_size, len(sequences)) * sequences.shape[1]  # read at least once

    model.eval()
    out = settings.out or ROOT / "experts" / settings.domain
    num_bytes = save_whole(model, tokenizer, out) if settings.full else save_adapter(model, out, base=BASE)
    dev_bpb = score_windows(model, tokenizer, dev_text).bpb
    print(
        f"{settings.domain}: {num_steps} steps on {num_tokens} tokens in {minutes:.1f} min; "
        f"dev BPB {base_bpb:.4f} -> {dev_bpb:.4f}; {num_bytes / 1e6:.2f} MB in {out}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a LoRA expert of SmolLM2-135M-Instruct on one domain.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start values and the order of sequences")
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter; needs --out")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=16, help="the adapter is scaled by alpha / rank")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak, after the warm-up")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=None, help="end earlier; the decay ends there, too")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="folder to write; default experts/DOMAIN")
    settings = parser.parse_args()
    if settings.full and settings.out is None:
        parser.error("--full writes a whole model: give --out a folder for it")
    return settings


def split_dev(text: str) -> tuple[str, str]:
    """Training and dev part of a text: the last `DEV_SHARE` of its characters is held out, from a line's start on."""
    border = text.index("\n", int(len(text) * (1 - DEV_SHARE))) + 1
    return text[:border], text[border:]


def cut_sequences(tokenizer, text: str, length: int) -> torch.Tensor:
    """The text's token ids in consecutive sequences, (num_sequences, length); a shorter rest is dropped."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    num_sequences = len(ids) // length
    return ids[: num_sequences * length].view(num_sequences, length)


def train(model, sequences: torch.Tensor, settings: argparse.Namespace) -> int:
    """Trains what requires a gradient, in place; returns the number of optimiser steps."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    num_steps = settings.epochs * math.ceil(len(sequences) / settings.batch_size)
    num_steps = min(num_steps, settings.max_steps or num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps))
    model.train()
    order = batches_of(len(sequences), settings.batch_size, seed=settings.seed)
    for step, indices in enumerate(islice(order, num_steps)):
        batch = sequences[indices]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step}/{num_steps} loss {loss.item():.3f}", flush=True)
    return num_steps


def save_whole(model, tokenizer, folder: Path) -> int:
    """Writes a model folder, float32; returns the bytes of its weights."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
