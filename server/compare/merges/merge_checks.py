"""Whether merged weights are a model: finite numbers, the vocabulary that was asked for, logits from a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError

NUM_CHECK_TOKENS = 16
COMPANIONS = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")


def check_vocabularies(folders: dict[str, Path]) -> None:
    """Raise `ModelLoadError` unless all of these models (name -> folder) give the same ids to the same tokens."""
    (first, first_folder), *others = folders.items()
    first_vocabulary = _vocabulary(first, first_folder)
    for name, folder in others:
        vocabulary = _vocabulary(name, folder)
        if vocabulary != first_vocabulary:
            strangers = sorted(set(vocabulary.items()) ^ set(first_vocabulary.items()), key=lambda item: item[::-1])
            raise ModelLoadError(
                f"{first!r} and {name!r} have different vocabularies ({len(strangers)} token-id pairs differ, for "
                f"example {strangers[0]}); give the recipe a `tokenizer: {{source: union}}`, merge models of one "
                "family, or vote on their texts instead (crowd_vote)"
            )


def check_weights(folder: Path) -> None:
    """Raise `ModelLoadError` if a number in the weights is NaN or infinite."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping: it cannot be iterated
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ModelLoadError(
                        f"the merged weight {name} holds NaN or infinite numbers; lower the recipe's weights or "
                        "densities, or set dtype: float32"
                    )


def check_model(folder: Path, first: Path, *, same_vocabulary: bool) -> None:
    """Raise `ModelLoadError` unless the model in `folder` loads whole, answers, and has what its first model has.

    Loads the weights: meant for a process that ends. `same_vocabulary`: whether the first model's must be kept.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if same_vocabulary:
        check_vocabularies({"the first model": first, "the merged model": folder})
    num_ids = max(_vocabulary("the merged model", folder).values()) + 1
    for name in COMPANIONS:
        if (first / name).is_file() and not (folder / name).is_file():
            raise ModelLoadError(f"the merged model lacks {name}, which its first model has; merge again")

    load: Any = AutoModelForCausalLM.from_pretrained  # with output_loading_info a pair, which its type does not say
    model, report = load(folder, local_files_only=True, output_loading_info=True)
    if wrong := [
        f"{kind.removesuffix('_keys')} {sorted(report[kind])[0]}"
        for kind in ("missing_keys", "unexpected_keys")
        if report[kind]
    ]:
        raise ModelLoadError(
            f"mergekit did not write all weights of {type(model).__name__} ({', '.join(wrong)}): it does not know this "
            "architecture well enough; choose models of another"
        )
    token_ids = torch.arange(NUM_CHECK_TOKENS).unsqueeze(0) % num_ids
    with torch.inference_mode():
        logits = model(token_ids).logits  # (1, NUM_CHECK_TOKENS, V)
    if logits.shape[-1] < num_ids:
        raise ModelLoadError(
            f"the merged model has weights for {logits.shape[-1]} tokens, its tokenizer gives ids up to {num_ids - 1}; "
            "set the recipe's `tokenizer`"
        )
    if not logits.isfinite().all():
        raise ModelLoadError(
            "a forward pass of the merged model gave NaN or infinite logits; lower the recipe's weights"
        )


def _vocabulary(name: str, folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    except Exception as exc:  # tokenizers raise whatever their parts raise
        raise ModelLoadError(f"{name!r} has no tokenizer that loads ({type(exc).__name__}: {exc})") from exc
