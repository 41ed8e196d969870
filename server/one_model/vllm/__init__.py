"""An ensemble directory as ONE vLLM model: `vllm serve DIR`, nothing else.

    __init__.py         tells vLLM of the architecture (entry point `vllm.general_plugins`)
    request_mixture.py  what a request may say about its mixture: `ensemble_weights`, `ensemble_pool`, `ensemble_share`
    backbones.py        which members stand on which weights, and how vLLM builds them
    shared_base.py      a backbone that is one base with several LoRA members on it
    model.py            the model class: backbones forward, their distributions are pooled row by row

There is one architecture, `EnsembleForCausalLM`. Members of one `path` form one backbone (`backbones.groups`); if any
of them has an adapter, that backbone is a `SharedBase`. Nothing in the directory says so: it follows from `members`.
"""

from __future__ import annotations
