"""What `ensemble fit --gate` says and writes: a gate beside the pools that it has to beat, and the file of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_server.server.cli.fit import gain, held_back_lines, verdict_of

if TYPE_CHECKING:
    from ensemble_server.server.compare.deciding.gates import JudgedGate

HEADER = "# Written by `ensemble fit --gate`: what moves the weights of a posterior pool at each token.\n"


def gate_lines(name: str, judged: JudgedGate) -> Iterator[str]:
    """Bits per byte on what is held back, of members, pools and gate; what the gate gains, and a verdict."""
    fit = judged.fit
    yield f"{name}: a gate trained on {fit.num_tokens} tokens of {judged.num_fitted} documents"
    yield f"share: fitted {judged.share:g}, under the gate {judged.share_under_gate:g}"
    if fit.penalty is not None:
        yield (
            f"penalty {fit.penalty:g}; nats per token in cross-validation: {fit.nats:.4f}, of the pool under the gate "
            f"{fit.posterior_nats:.4f}"
        )
    else:
        yield "cross-validation found no gate that is better than none: below it is the posterior pool itself"
    yield ""
    yield from held_back_lines(judged.share_seen, judged.num_held_back)
    rows = {f"{member} alone": scores for member, scores in judged.alone.items()}
    rows |= {
        "uniform": judged.scores["uniform"],
        "posterior, as configured": judged.scores["configured"],
        f"posterior, share {judged.share:g}": judged.scores["posterior"],
        "gate": judged.scores["gate"],
    }
    width = max(map(len, rows))
    for label, scores in rows.items():
        yield f"  {label:<{width}}  {scores.bits_per_byte:.4f}"
    yield f"  gate less uniform    {gain(judged.against['uniform'])}"
    yield f"  gate less posterior  {gain(judged.against['posterior'])}"
    match verdict_of(judged.against["posterior"]):
        case "better":
            yield "the gate predicts this text better than the posterior pool"
        case "better by less than the margin":
            yield "the gate is better than the posterior pool, but by too little to matter: keep that, it is simpler"
        case _:
            yield "the gate is not shown to be better than the posterior pool: keep that, it is simpler"


def write_gate(config: Path, target: Path, name: str, judged: JudgedGate) -> Path:
    """The gate's own file beside `target`, and `target`: the config that names it. -> the gate's file.

    The gate first: what names a file finds it there at any time.
    """
    import yaml

    from ensemble_server.server.config.edit import with_gate
    from ensemble_server.server.disk.whole_file import write_whole

    place = target.with_name(f"{target.stem}.{name}.gate.yaml")
    text = with_gate(config.read_bytes().decode("utf-8"), name, judged.share_under_gate, place.name)
    gate = judged.fit.gate.model_dump(mode="json")
    write_whole(place, (HEADER + yaml.safe_dump(gate, sort_keys=False)).encode())
    write_whole(target, text.encode())
    return place
