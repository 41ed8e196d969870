"""vLLM as the engine behind the same API: continuous batching, paged caches and tensor parallelism that are not ours.

    engine.py        what the server asks of an engine; sends each mixture to the vLLM model that holds its members
    plan.py          everything that can be known, and refused, before a process is started
    placement.py     which members share one vLLM model
    views.py         how members read text, without their weights
    directories.py   the model directory that vLLM loads: a checkpoint as it is, or an exported ensemble
    arguments.py     the config's `engine:` block in vLLM's terms; the memory of several models
    parameters.py    a request's sampling in vLLM's terms, and what vLLM cannot do of it
    choice.py        vLLM's tokens -> the deltas of one choice
    generation.py    one request: its choices side by side, to the last event
    model.py         a vLLM model: how a mixture is told to it
    process.py       its processes: started, watched, and started again when it dies
    queue.py         how many requests may wait
    step_stats.py    vLLM's own counts as the server's metrics

vLLM is imported inside functions only: it is an extra.
"""
