"""An ensemble as ONE model directory, which other tools load as if it were a single model.

    export.py               writes the directory: config.json, tokenizer, references to the members' weights
    configuration.py        config.json as transformers reads it (`model_type: ensemble`)
    transformers_model.py   `AutoModelForCausalLM`: generate(), pipeline(), lm-evaluation-harness
    evidence.py             the posterior pool's weights, kept in the cache beside the members' keys and values

Importing this package tells transformers' auto classes of the type; with `trust_remote_code=True` the directory does
that itself.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from ensemble_server.server.one_model.configuration import EnsembleConfig
from ensemble_server.server.one_model.transformers_model import EnsembleForCausalLM

AutoConfig.register("ensemble", EnsembleConfig, exist_ok=True)
AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
