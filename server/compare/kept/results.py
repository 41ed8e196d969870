"""The shape of `results.json`: what a comparison found, ready to be read by other programs and by the report.

The report is made of this alone, never of a model. What each item scored lies beside it, in `arms/NAME.json`
(`server.compare.kept.records`). Bits per byte are better low, scores of tasks better high; a difference is always
the arm's figure less the baseline's. Every interval is [low, high] at the confidence that `statistics.alpha` leaves
(0.05: 95%), None with fewer than two items.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ensemble_server.ensembles.comparison.verdict import Verdict
from ensemble_server.server.disk.whole_file import write_whole

Interval = tuple[float, float]
ArmKind = Literal["member", "remote", "ensemble", "merge", "distilled", "cost_matched"]


class Part(BaseModel):
    """One object of results.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Difference(Part):
    """An arm against the baseline on the same items. `p_holm`: Holm-adjusted over the arms of this measure.

    `detectable`: the smallest true difference that this test on this many items, corrected for all arms, shows four
    times in five; None if it can show none. `effect_size`: see `ensembles.comparison.effect_size`; None if it is not
    finite. `wins`, `ties`, `losses` count items on which the arm is better, equal, worse; for right or wrong answers
    they are all that McNemar's test uses. `lag`: correlation of the differences of neighbouring documents of one text;
    `num_units`: items, or clusters of them, before that counts.
    """

    difference: float
    ci: Interval | None
    p: float
    p_holm: float
    test: Literal["mcnemar", "sign_flip", "student_t"]
    verdict: Verdict
    effect_size: float | None = None
    effect_size_name: Literal["cohens_h", "cohens_d_z"] = "cohens_d_z"
    detectable: float | None = None
    wins: int = 0
    ties: int = 0
    losses: int = 0
    lag: float | None = None
    num_units: int | None = None


class Figure(Part):
    """A mean over several texts or tasks, each counted alike."""

    value: float
    ci: Interval | None
    against_baseline: Difference | None = None


class TextResult(Part):
    """`ci`: of the bits per byte, over documents. `perplexity` is per token, so it depends on the tokenizer; None where
    it is too large for a number."""

    bpb: float
    ci: Interval | None
    perplexity: float | None
    num_documents: int
    num_bytes: int
    num_tokens: int
    against_baseline: Difference | None = None


class TaskResult(Part):
    """`num_failed` items gave an error and `num_missing` no answer; both count as wrong (a score of 0).

    `pass_at_k`: k -> the chance that one of k samples is right, where a task asks for several.
    """

    metric: str
    higher_is_better: bool = True
    score: float
    ci: Interval | None
    num_items: int
    num_missing: int = 0
    num_failed: int = 0
    pass_at_k: Mapping[int, float] = Field(default_factory=dict)
    against_baseline: Difference | None = None


class Timing(Part):
    """Median over interleaved rounds. `ci`: interval of the median, None below 6 rounds (at 95%): there is none then,
    only `range`, from the lowest to the highest round."""

    median: float
    ci: Interval | None
    values: tuple[float, ...]
    range: Interval | None = None


class Cost(Part):
    """What an arm costs, measured in turns with the other arms on the same machine.

    `tokens_per_s`: answer tokens of all streams together, by number of requests at once ("1", "16"). `ttft_s`: time to
    the first token, alone. `weights_bytes`: of everything that must be loaded for this arm. `kv_bytes`: KV cache of one
    sequence of `kv_tokens` tokens, all members. `forward_tokens_per_answer_token`: forwards of one token through one
    member, prompt included, per token of the answer. `spend`: in the config's currency, of all rounds. What is not
    known (the memory of a remote model, forwards that an endpoint does not tell, what one without a price takes) is
    None. `speed_ratio`: of
    `tokens_per_s` to the baseline's, paired by round.
    """

    tokens_per_s: Mapping[str, Timing] = Field(default_factory=dict)
    speed_ratio: Mapping[str, Timing] = Field(default_factory=dict)
    ttft_s: Timing | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    forward_tokens_per_answer_token: float | None = None
    spend: float | None = 0.0


class ReplicateSpread(Part):
    """One text measured with members that were trained with other seeds. `values`: replicate -> bits per byte.

    `differences`: the same, less the baseline's in that replicate; `spread`: their standard deviation over replicates;
    `ci`: of the mean difference, over replicates and documents at once.
    """

    values: Mapping[str, float]
    differences: Mapping[str, float]
    mean: float
    spread: float | None
    ci: Interval | None


class Choice(Part):
    """What was chosen on the held-out split. `candidates`: name -> its figure there (bits per byte, or score)."""

    name: str
    candidates: Mapping[str, float]
    measure: Literal["bpb", "score"]


class ArmResult(Part):
    """One arm. With an `error` the arm could not be built or run; what was measured before still stands.

    `weights`, `share`: of a pool, where they were fitted; `chosen`: the variant that the held-out split chose, and what
    every variant scored there. `skipped`: measures that this kind of model cannot have, with the reason.
    """

    kind: ArmKind
    model: str
    members: tuple[str, ...] = ()
    description: str = ""
    text: Mapping[str, TextResult] = Field(default_factory=dict)
    tasks: Mapping[str, TaskResult] = Field(default_factory=dict)
    mean_text: Figure | None = None
    mean_tasks: Figure | None = None
    cost: Cost = Cost()
    weights: Mapping[str, float] | None = None
    share: float | None = None
    chosen: Choice | None = None
    replicates: Mapping[str, ReplicateSpread] = Field(default_factory=dict)
    skipped: Mapping[str, str] = Field(default_factory=dict)
    error: str | None = None


class BestOfKinds(Part):
    """The best arm of a kind against the best of another, both chosen on the measured items.

    `kind`, `other_kind`: "member" means remote ones, too. `difference`: of the figures, `arm` less `other`. `ci` pays
    for the choice: it is taken at `level`, at which the intervals of all `num_pairs` pairs hold together with the
    confidence of `statistics.alpha`. `measure`: "mean text", "mean task", "text NAME" or "task NAME".
    """

    measure: str
    kind: ArmKind
    arm: str
    other_kind: ArmKind
    other: str
    higher_is_better: bool
    figure: float
    other_figure: float
    difference: float
    ci: Interval | None
    level: float
    num_pairs: int
    verdict: Verdict


class WinRate(Part):
    """`win_rate`: the chance to beat another arm, drawn at random, on an item. `log_strength`: Bradley and Terry's, sum
    zero over the arms, with its interval `ci`."""

    win_rate: float
    log_strength: float
    ci: Interval | None
    num_items: int


class NullCheck(Part):
    """The baseline against itself: where nothing differs, does the test claim that something does?

    `num_significant` of `num_trials` comparisons fell below alpha. For texts the other side is the same model with
    windows that begin elsewhere; for tasks that sample, a second run with other seeds. A third check asks whether
    blocks of neighbouring documents vary more than single ones are taken to. `has_passed`: not more than chance
    explains.
    """

    measure: str
    method: str
    num_trials: int
    num_significant: int
    alpha: float
    largest_difference: float
    has_passed: bool


class TokenView(Part):
    """One token of a text and the log-probability (nats) that each member gave it, and the ensemble as a whole."""

    text: str
    logprob: float | None = None
    members: Mapping[str, float] = Field(default_factory=dict)
    weights: Mapping[str, float] = Field(default_factory=dict)


class Flip(Part):
    """An item on which an arm and the baseline disagree. For tasks: right against wrong; for texts: the documents whose
    bits per byte moved most. `tokens`: of the arm's output (tasks) or of the document's start (texts)."""

    arm: str
    measure: str
    item: str
    is_better: bool
    prompt: str
    reference: str | None
    baseline_output: str | None
    arm_output: str | None
    baseline_score: float
    arm_score: float
    tokens: tuple[TokenView, ...] = ()


class StatisticsUsed(Part):
    seed: int
    num_resamples: int
    alpha: float
    margin_bpb: float
    margin_score: float


class MeasureIdentity(Part):
    """What every arm was given. `sha256`: of all items (and prompts, for tasks) in order; equal for all arms that have
    a figure, or the arm is reported as failed. `clusters`: a number for each item, equal for those that go together,
    where the plan names a `cluster`."""

    num_items: int
    sha256: str
    source: str
    metric: str = "bpb"
    clusters: tuple[int, ...] | None = None


class Results(Part):
    """The whole file. `texts` and `tasks` name the measures in the plan's order, with what proves them equal.

    `mean_over`: the measures that `mean_text` and `mean_tasks` count alike: those that every arm has which has any;
    `left_out`: measures ("text NAME", "task NAME") that they leave out, with the reason. `win_rates`: "text", "task" ->
    arm -> over the items of these.
    """

    version: Literal[1] = 1
    title: str = ""
    baseline: str
    arms: Mapping[str, ArmResult]
    texts: Mapping[str, MeasureIdentity] = Field(default_factory=dict)
    tasks: Mapping[str, MeasureIdentity] = Field(default_factory=dict)
    best_of_kinds: tuple[BestOfKinds, ...] = ()
    win_rates: Mapping[str, Mapping[str, WinRate]] = Field(default_factory=dict)
    null_checks: tuple[NullCheck, ...] = ()
    flips: tuple[Flip, ...] = ()
    notes: tuple[str, ...] = ()
    mean_over: Mapping[Literal["text", "task"], tuple[str, ...]] = Field(default_factory=dict)
    left_out: Mapping[str, str] = Field(default_factory=dict)
    statistics: StatisticsUsed
    provenance: Mapping[str, Any] = Field(default_factory=dict)

    def save(self, path: Path) -> None:
        write_whole(path, self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises `pydantic.ValidationError` if the file is not one that `save` wrote."""
        return cls.model_validate_json(path.read_bytes())
