"""What a LoRA adapter's own files ask for, and what of it no engine here can give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.weights.delta_folder import CARD, read_card

# What a LoRA config can ask for beyond y = W x + B A x: other formulas, weights besides A and B, changed base layers.
_BEYOND_PLAIN_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_beyond_plain_lora(name: str, config: Any) -> None:
    """Raises `ModelLoadError` if the adapter `name` asks for anything that y = W x + B A x · scaling cannot give.

    config: a `PeftConfig`; what else it has depends on its type.
    """
    if config.peft_type != "LORA":
        raise ModelLoadError(f"adapter {name!r} is of type {config.peft_type.value}; only LoRA adapters are supported")
    for feature in _BEYOND_PLAIN_LORA:
        if getattr(config, feature, None):
            raise ModelLoadError(
                f"adapter {name!r} uses {feature}, which cannot share its base's forward; "
                "merge it into the base (PEFT's merge_and_unload) and load the result as a model of its own"
            )
    if config.bias != "none":
        raise ModelLoadError(f"adapter {name!r} trains biases (bias={config.bias!r}); merge it into the base instead")
    if str(config.init_lora_weights).lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise ModelLoadError(
            f"adapter {name!r} was started with init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "for everyone on it; save it as a plain LoRA (path_initial_model_for_weight_conversion) or merge it"
        )


def check_adapter(name: str, folder: Path) -> None:
    """Raises `ModelLoadError` for what can be told without its weights: no adapter there, or one that is refused."""
    from peft import PeftConfig

    if (folder / CARD).is_file() and not read_card(folder).is_adapter:
        raise ModelLoadError(
            f"adapter {name!r} at {folder} is a delta that is more than an adapter; write `delta` in place of `adapter`"
        )
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    if not (folder / "adapter_config.json").is_file() or not any((folder / file).is_file() for file in weights):
        raise ModelLoadError(
            f"adapter {name!r} at {folder} cannot be loaded: it needs adapter_config.json and {weights[0]}; "
            "`adapter` takes the folder that PEFT saved"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as exc:  # PEFT raises what its parts raise
        raise ModelLoadError(
            f"adapter {name!r} at {folder} cannot be loaded ({type(exc).__name__}: {exc}); save it again"
        ) from exc
    refuse_beyond_plain_lora(name, config)


def adapter_of(name: str, entry: HostedModel) -> Path | None:
    """The PEFT folder of member `name`, for what runs LoRA adapters only: its adapter, or a delta that is one.

    Raises `ModelLoadError` for any other delta.
    """
    if entry.delta is None:
        return None if entry.adapter is None else Path(entry.adapter)
    card = read_card(Path(entry.delta))
    if not card.is_adapter:
        what = f"of method {card.method}" if card.method != "svd" else f"with {len(card.kept)} weights that it keeps"
        raise ModelLoadError(
            f"model {name!r}: a delta {what} runs in the transformers engine only; vLLM and exported ensembles take "
            "those that are LoRA adapters (ensemble compress --method svd --vectors base --embeddings base)"
        )
    return Path(entry.delta)
