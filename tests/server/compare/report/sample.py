"""Results of a small comparison with every kind of row in it, and with names and texts that mean harm."""

from __future__ import annotations

from ensemble_server.server.compare.kept.results import (
    ArmResult,
    BestOfKinds,
    Choice,
    Cost,
    Difference,
    Figure,
    Flip,
    MeasureIdentity,
    NullCheck,
    ReplicateSpread,
    Results,
    StatisticsUsed,
    TaskResult,
    TextResult,
    Timing,
    TokenView,
)

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>```\n| {{ 7 * 7 }} \"quoted\" 'single'"
BASE_BPB = {"code": 0.789, "jargon": 1.394, "shakespeare": 1.613}


def difference(value: float, half: float, verdict: str, **changes) -> Difference:
    found = {
        "difference": value,
        "ci": (value - half, value + half),
        "p": 0.0004 if verdict in ("better", "worse") else 0.4,
        "p_holm": 0.002 if verdict in ("better", "worse") else 0.8,
        "test": "sign_flip",
        "verdict": verdict,
        "detectable": 0.02,
        "wins": 20,
        "losses": 12,
    }
    return Difference(**(found | changes))


def text(bpb: float, against: Difference | None) -> TextResult:
    return TextResult(
        bpb=bpb,
        ci=(bpb - 0.02, bpb + 0.02),
        perplexity=9.5,
        num_documents=32,
        num_bytes=65536,
        num_tokens=21000,
        against_baseline=against,
    )


def timing(median: float) -> Timing:
    return Timing(median=median, ci=(0.95 * median, 1.05 * median), values=(0.95 * median, median, 1.05 * median))


def arm(kind: str, gains: tuple[float, float, float] | None, verdict: str, speed: float | None, **changes) -> ArmResult:
    """`gains`: bits per byte saved on each text; None without texts. `speed`: tokens a second of one request."""
    found: dict = {"kind": kind, "model": "m", "members": ("base", "code")}
    if gains is not None:
        values = {name: BASE_BPB[name] - gain for name, gain in zip(BASE_BPB, gains, strict=True)}
        found["text"] = {
            name: text(value, difference(value - BASE_BPB[name], 0.012, verdict) if verdict else None)
            for name, value in values.items()
        }
        mean = sum(values.values()) / 3
        against = difference(-sum(gains) / 3, 0.011, verdict) if verdict else None
        found["mean_text"] = Figure(value=mean, ci=(mean - 0.02, mean + 0.02), against_baseline=against)
    if speed is not None:
        found["cost"] = Cost(
            tokens_per_s={"1": timing(speed), "16": timing(6 * speed)},
            ttft_s=timing(1.5 / speed),
            weights_bytes=540_000_000,
            kv_bytes=23_600_000,
            kv_tokens=512,
            forward_tokens_per_answer_token=2.5,
        )
    return ArmResult(**(found | changes))


def task(score: float, against: Difference | None = None, **changes) -> dict:
    result = TaskResult(
        metric="numeric",
        score=score,
        ci=(score - 0.1, score + 0.1),
        num_items=80,
        against_baseline=against,
        **changes,
    )
    figure = Figure(value=score, ci=(score - 0.1, score + 0.1), against_baseline=against)
    return {"tasks": {"sums": result}, "mean_tasks": figure}


def sample() -> Results:
    better = difference(0.2, 0.08, "better", test="mcnemar", wins=22, losses=6)
    open_ = difference(0.02, 0.09, "inconclusive", test="mcnemar", detectable=0.13)
    tokens = tuple(
        TokenView(
            text=piece,
            logprob=-0.4 * place,
            members={"base": -0.9 * place, "code": -0.3 * (5 - place % 6), "jargon": -2.0},
            weights={"base": 0.5, "code": 0.3, "jargon": 0.2},
        )
        for place, piece in enumerate(["def", " add", "(", "a", ",", " b", "):\n", "    return", " a", "+", "<b>"])
    )
    return Results(
        title="Ensembles against merges",
        baseline="base",
        arms={
            "base": arm("member", (0, 0, 0), "", 22.0, **task(0.31)),
            "code": arm("member", (0.043, 0.029, 0.026), "better", 21.5, **task(0.33, open_)),
            "jargon": arm("member", (-0.027, 0.176, -0.067), "worse", 21.8),
            "adaptive": arm(
                "ensemble",
                (0.042, 0.175, 0.086),
                "better",
                9.1,
                **task(0.51, better, num_failed=2, num_missing=1, pass_at_k={1: 0.4, 5: 0.7}),
                chosen=Choice(name="share 0.01", candidates={"share 0": 1.164, "share 0.01": 1.163}, measure="bpb"),
                replicates={
                    "code": ReplicateSpread(
                        values={"main": 0.747, "seed 1": 0.75},
                        differences={"main": -0.042, "seed 1": -0.039},
                        mean=-0.0405,
                        spread=0.002,
                        ci=(-0.05, -0.03),
                    )
                },
            ),
            "mix": arm(
                "ensemble", (0.035, 0.119, 0.071), "better", 9.4, weights={"base": 0.2, "code": 0.3, "jargon": 0.5}
            ),
            "linear": arm("merge", (0.039, 0.115, 0.08), "better", 22.1),
            "ties": arm("merge", (0.004, 0.003, 0.001), "no difference shown", 22.0),
            "self-consistency x3": arm(
                "cost_matched", None, "", 7.9, **task(0.38, open_), skipped={"text code": "samples have no likelihood"}
            ),
            "solar": arm("merge", None, "", None, error="build: mergekit failed (RuntimeError: out of layers)"),
            "$bad_{name}$ <i>": arm("ensemble", (0.01, -0.004, 0.002), "inconclusive", 8.5),
        },
        texts={name: MeasureIdentity(num_items=32, sha256="ab" * 32, source=f"{name}_test.txt") for name in BASE_BPB},
        tasks={"sums": MeasureIdentity(num_items=80, sha256="cd" * 32, source="sums.jsonl", metric="numeric")},
        best_of_kinds=(
            BestOfKinds(
                measure="mean text",
                kind="ensemble",
                arm="adaptive",
                other_kind="merge",
                other="linear",
                higher_is_better=False,
                figure=1.164,
                other_figure=1.187,
                difference=-0.023,
                ci=(-0.034, -0.012),
                level=0.984,
                num_pairs=6,
                verdict="better",
            ),
            BestOfKinds(
                measure="mean task",
                kind="ensemble",
                arm="adaptive",
                other_kind="member",
                other="code",
                higher_is_better=True,
                figure=0.51,
                other_figure=0.33,
                difference=0.18,
                ci=(0.03, 0.33),
                level=0.962,
                num_pairs=2,
                verdict="better",
            ),
        ),
        null_checks=(
            NullCheck(
                measure="text code",
                method="random halves of the documents",
                num_trials=200,
                num_significant=9,
                alpha=0.05,
                largest_difference=0.04,
                has_passed=True,
            ),
        ),
        flips=(
            Flip(
                arm="adaptive",
                measure="task sums",
                item="q7",
                is_better=True,
                prompt="A box holds 3 red and 4 blue pens. How many pens are in two boxes?",
                reference="14",
                baseline_output="There are 7 pens.",
                arm_output=HOSTILE,
                baseline_score=0.0,
                arm_score=1.0,
                tokens=tokens,
            ),
            Flip(
                arm="linear",
                measure="text code",
                item="document 3",
                is_better=False,
                prompt="def main():\n    pass\n",
                reference=None,
                baseline_output=None,
                arm_output=None,
                baseline_score=0.71,
                arm_score=0.78,
            ),
        ),
        notes=("sums: likelihoods have no use for samples, so there is no cost-matched arm.",),
        statistics=StatisticsUsed(seed=0, num_resamples=2000, alpha=0.05, margin_bpb=0.01, margin_score=0.02),
        provenance={
            "command": "ensemble compare plan.yaml --out out",
            "versions": {"torch": "2.13.0", "mergekit": None},
            "git": {"commit": "0123abcd", "has_changes": False},
            "hardware": {"cores": 2, "accelerators": []},
        },
    )
