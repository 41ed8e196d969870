"""The ensemble as a transformers model: members forward, their distributions are pooled, `generate()` does the rest.

Logits are the mixture's log-probabilities, so that everything built on `generate()` (sampling, beams, assisted
generation, `pipeline`, lm-evaluation-harness) works on the mixture. Members that are adapters of one base share its
weights, which are held once; their forwards run one after the other (the server's own engine stacks them).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.pooling import effective_weights, pool
from ensemble_server.server.one_model.configuration import EnsembleConfig
from ensemble_server.server.one_model.evidence import EvidenceLayer
from ensemble_server.server.weights.causal_lm import load_causal_lm
from ensemble_server.server.weights.checkpoints import resolve_checkpoint

if TYPE_CHECKING:
    from peft import PeftModel

SHARED_SETTINGS = frozenset({"dtype", "device_map", "attn_implementation", "low_cpu_mem_usage", "max_memory"})


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """Made by `from_pretrained(DIR)`. `config.members` says which weights are read."""

    config_class = EnsembleConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: EnsembleConfig, backbones: Mapping[str, PreTrainedModel | PeftModel]) -> None:
        """backbones: by member's path; a path that several members name is loaded once, with their adapters on it."""
        super().__init__(config)
        self.mixture = config.mixture  # members of weight zero are left out
        self._members = [member for member in config.members if member["name"] in self.mixture.weights]
        self._paths = list(dict.fromkeys(member["path"] for member in self._members))
        self.backbones = nn.ModuleList([backbones[path] for path in self._paths])
        self._weights = effective_weights(list(self.mixture.weights.values()))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: EnsembleConfig | None = None,
        **kwargs: Any,
    ) -> EnsembleForCausalLM:
        """Loads the members that DIR names. device_map, attn_implementation and, instead of the
        dtypes that DIR names, dtype go to each of them.

        Raises `ModelLoadError` if a member's weights cannot be found, or transformers cannot load them.
        """
        folder = Path(pretrained_model_name_or_path)
        if config is None:
            config = EnsembleConfig.from_pretrained(folder)
        settings = {key: kwargs[key] for key in SHARED_SETTINGS & kwargs.keys()}
        names = config.mixture.weights
        backbones: dict[str, PreTrainedModel | PeftModel] = {}
        for member in (member for member in config.members if member["name"] in names):
            path = member["path"]
            if path not in backbones:
                checkpoint = resolve_checkpoint(path, relative_to=folder)
                backbones[path] = _backbone(member["name"], checkpoint, {"dtype": member["dtype"], **settings})
            if member["adapter"] is not None:
                backbones[path] = _with_adapter(backbones[path], folder / member["adapter"], member["name"])
        model = cls(config, backbones).eval()
        model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids: (B, T). -> logits (B, T or logits_to_keep, V) float32: the mixture's log-probabilities."""
        follows_evidence = self.mixture.pool == "posterior" and len(self._members) > 1
        cache = past_key_values
        if cache is None and (use_cache or follows_evidence):
            cache = self._new_cache()
        length_before = cache.get_seq_length() if cache is not None else 0
        logprobs = torch.stack(
            [
                self._member_logprobs(
                    index,
                    input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=self._cache_of(index, cache),
                    use_cache=cache is not None,
                    logits_to_keep=0 if follows_evidence else logits_to_keep,
                )
                for index in range(len(self._members))
            ]
        )  # (K, B, T, V)
        weights = torch.from_numpy(self._weights).expand(*logprobs.shape[1:3], -1)
        if follows_evidence:
            judged = _is_judged(attention_mask, input_ids, length_before)
            weights = _evidence_of(cache).follow(input_ids, judged, logprobs.transpose(0, 1))
        if follows_evidence and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logprobs, weights = logprobs[:, :, keep], weights[:, keep]
        rows = weights.flatten(0, 1).T.to(logprobs.device, torch.float32)  # (K, B * T)
        logits: Any = pool(self.mixture.pool, logprobs.flatten(1, 2), rows).unflatten(0, logprobs.shape[1:3])
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size) if labels is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def get_input_embeddings(self) -> nn.Module:
        """Of the first member: tools look at it for the device. Inputs are token ids, since members embed them each."""
        return self._backbone_of(0).get_input_embeddings()

    def _member_logprobs(self, index: int, input_ids: torch.LongTensor, **settings: Any) -> torch.Tensor:
        """(B, T, V) float32, normalised over the ensemble's vocabulary: columns of padding are cut before."""
        member = self._members[index]
        backbone = self._backbone_of(index)
        with _selected(backbone, member["name"] if member["adapter"] is not None else None):
            logits = backbone(input_ids=input_ids.to(backbone.device), **settings).logits
        return torch.log_softmax(logits[..., : self.config.vocab_size].float(), dim=-1).to(input_ids.device)

    # --- one cache that holds every member's layers ---------------------------------------------------------------

    def _new_cache(self) -> Cache:
        layers = [
            layer for index in range(len(self._members)) for layer in DynamicCache(config=self._config_of(index)).layers
        ]
        if self.mixture.pool == "posterior" and len(self._members) > 1:
            layers.append(EvidenceLayer(self._weights, self.mixture.share))
        return Cache(layers=layers)

    def _config_of(self, index: int) -> Any:
        return self._backbone_of(index).config

    def _backbone_of(self, index: int) -> Any:
        """Member `index`'s weights. Any: PEFT's and transformers' classes declare little of what both have."""
        return self.backbones[self._paths.index(self._members[index]["path"])]

    def _cache_of(self, index: int, cache: Cache | None) -> Cache | None:
        """Member `index`'s part of the cache: the same layers, seen as a cache of their own."""
        if cache is None:
            return None
        sizes = [self._config_of(i).get_text_config().num_hidden_layers for i in range(index + 1)]
        return Cache(layers=cache.layers[sum(sizes[:-1]) : sum(sizes)])

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """`generate()` asks for a cache here. Only growing caches can hold members of different shapes."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"an ensemble has a dynamic cache, not a {generation_config.cache_implementation!r} one")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._new_cache()
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()


def _evidence_of(cache: Cache | None) -> EvidenceLayer:
    layer = cache.layers[-1] if cache is not None else None
    assert isinstance(layer, EvidenceLayer), "a posterior pool's cache ends with its evidence"
    return layer


def _backbone(name: str, checkpoint: Path, settings: Mapping[str, Any]) -> PreTrainedModel:
    """The model of `checkpoint`, quantised if that is. name: of its first member."""
    try:
        return load_causal_lm(checkpoint, **settings)
    except ModelLoadError as exc:
        raise ModelLoadError(f"member {name!r}: {exc}") from exc


def _with_adapter(backbone: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    """`backbone` with one more adapter on it, called `name`."""
    from peft import PeftModel

    if isinstance(backbone, PeftModel):
        backbone.load_adapter(str(folder), adapter_name=name)
        return backbone
    return PeftModel.from_pretrained(backbone, str(folder), adapter_name=name)


def _selected(backbone: Any, adapter: str | None) -> AbstractContextManager[None]:
    """Within the returned context `backbone` is its `adapter`, or the bare base for None."""
    if not hasattr(backbone, "peft_config"):
        return nullcontext()
    if adapter is None:
        return backbone.disable_adapter()
    backbone.set_adapter(adapter)
    return nullcontext()


def _is_judged(attention_mask: torch.Tensor | None, input_ids: torch.Tensor, length_before: int) -> torch.Tensor:
    """(B, T): whether each token is evidence: it is no padding, and the token before it, which predicts it, neither."""
    total = length_before + input_ids.shape[1]
    real = torch.ones(len(input_ids), total, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    after_real = torch.nn.functional.pad(real[:, :-1], (1, 0), value=False)
    return (real & after_real)[:, length_before:]
