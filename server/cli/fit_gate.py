"""What `ensemble fit --gate` says and writes: a gate beside the pools that it has to beat, and the file of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ensemble_server.ensembles.comparison.verdict import Verdict
    from ensemble_server.server.compare.deciding.gates import JudgedGate

MARGIN_BITS_PER_BYTE = 0.01  # the smallest difference that the verdict takes for one that matters
HEADER = "# Written by `ensemble fit --gate`: what moves the weights of a posterior pool at each token.\n"


def gate_lines(name: str, judged: JudgedGate) -> Iterator[str]:
    """Bits per byte on what is held back, of members, pools and gate; what the gate gains, and a verdict."""
    from ensemble_server.server.compare.planning.held_out import MAX_SHARE, NUM_WORDS

    fit = judged.fit
    yield f"{name}: a gate trained on {fit.num_tokens} tokens of {judged.num_fitted} documents"
    yield f"share: fitted {judged.share:g}, under the gate {judged.share_under_gate:g}"
    if fit.penalty is not None:
        yield (
            f"penalty {fit.penalty:g}; nats per token in cross-validation: {fit.nats:.4f}, of the pool under the gate "
            f"{fit.posterior_nats:.4f}"
        )
    else:
        yield "cross-validation found no gate that is better than none: this one is the posterior pool itself"
    yield ""
    if judged.share_seen > MAX_SHARE:
        yield (
            f"{judged.share_seen:.0%} of what is held back (sequences of {NUM_WORDS} words) stands in what was fitted "
            "to, too: the gain below is no evidence of one on other text"
        )
    yield f"on {judged.num_held_back} documents held back, bits per byte:"
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
    yield f"  gate less uniform    {_difference(judged, 'uniform')}"
    yield f"  gate less posterior  {_difference(judged, 'posterior')}"
    match _verdict(judged, "posterior"):
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


def _difference(judged: JudgedGate, other: str) -> str:
    difference = judged.against[other].difference
    interval = "too few documents for an interval"
    if (found := difference.interval) is not None:
        interval = f"95% interval {found.low:+.4f} to {found.high:+.4f}"
    return f"{difference.value:+.4f} ({interval}): {_verdict(judged, other)}"


def _verdict(judged: JudgedGate, other: str) -> Verdict:
    from ensemble_server.ensembles.comparison.verdict import verdict

    compared = judged.against[other]
    return verdict(
        compared.difference.interval,
        margin=MARGIN_BITS_PER_BYTE,
        higher_is_better=False,
        adjusted_p_value=compared.p_value,
        smallest_p_value=compared.smallest_p_value,
    )
