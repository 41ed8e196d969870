"""What a student is, how it was made and what it reached: for programs (`distillation.json`), readers, and drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.report.figures import STYLE
from ensemble_server.server.disk.whole_file import write_whole
from ensemble_server.server.distill.dialogues import AnswerCounts
from ensemble_server.server.distill.training import StepLosses

CARD_FILE = "distillation.json"
LOSSES_FILE = "losses.csv"
FIGURE_FILE = "losses.svg"
_CLM, _KL = "#0072b2", "#d55e00"  # of Okabe and Ito's colours, which colour-blind readers can tell apart


class Figures(BaseModel):
    """On what was held out. `kl`: of the ensemble's distributions to the student's, nats per token."""

    model_config = ConfigDict(frozen=True)

    bits_per_byte: float
    kl: float | None


class Card(BaseModel):
    """`settings`: what was asked for; `teacher`: the ensemble's entry; `files`: SHA-256 of each text.

    `align`: how members of other vocabularies were told in the student's tokens; None: there is one vocabulary.
    `has_targets`: whether the teacher's distributions were learnt from; answers and texts alone otherwise. `answers`:
    of each file of prompts. `ensemble_bits_per_byte`: None if the ensemble gives text alone.

    `start`: the merge that the student started from; `start_folder`: of its weights under an adapter, where no model of
    the config is (relative: inside the student's folder).

    `fingerprint`: of all that decides the result but the time that there was. `share_seen`: of the sequences of 13
    words that were held out, those that stand in the text trained on as well.
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    ensemble: str
    student: str
    base: str
    is_adapter: bool
    start: str | None = None
    start_folder: str | None = None
    settings: dict[str, Any]
    teacher: dict[str, Any]
    files: dict[str, str]
    has_targets: bool = True
    align: str | None = None
    answers: dict[str, AnswerCounts] = {}
    num_train_tokens: int
    num_held_out_tokens: int
    share_seen: float
    steps: int
    minutes: float
    before: Figures
    after: Figures
    ensemble_bits_per_byte: float | None
    versions: dict[str, str | None]

    @classmethod
    def load(cls, folder: Path) -> Card:
        """Raises `ConfigError` if the folder has none that can be read."""
        try:
            return cls.model_validate_json((folder / CARD_FILE).read_bytes())
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{folder} is no student that `ensemble distill` has made; give another folder") from exc

    def write(self, folder: Path, losses: Sequence[StepLosses]) -> None:
        """Beside the weights: the card twice, the losses, and their figure where matplotlib is installed."""
        table = "".join(f"{one.step},{one.clm:.6g},{'' if one.kl is None else f'{one.kl:.6g}'}\n" for one in losses)
        write_whole(folder / LOSSES_FILE, f"step,clm_nats,kl_nats\n{table}".encode())
        figure = drawn(losses)
        if figure is not None:
            write_whole(folder / FIGURE_FILE, figure.encode())
        write_whole(folder / "README.md", self.page(has_figure=figure is not None).encode())
        write_whole(folder / CARD_FILE, (self.model_dump_json(indent=1) + "\n").encode())

    def page(self, *, has_figure: bool) -> str:
        """Markdown."""
        settings = self.settings
        start = f"`{settings['init']}`" if self.start is None else self.start
        under = f"`{self.base}`" if self.start is None else "that start"
        what = f"A LoRA adapter of rank {settings['rank']} on {under}" if self.is_adapter else f"All weights of {under}"
        reached = self.ensemble_bits_per_byte
        if reached is None:
            taught, loss = f"the answers of `{self.ensemble}`", "the answers' text."
        else:
            taught = (
                "the text alone" if settings["clm"] == 1 else f"the ensemble `{self.ensemble}` ({settings['target']})"
            )
            loss = f"{settings['clm']:g} of the text, {1 - settings['clm']:g} of the teacher."
        if self.align is not None:
            loss += f" What members of other vocabularies expect was told in the student's tokens: {self.align}."
        lines = [
            f"# {self.student}, taught by {taught}",
            "",
            f"{what}, started from {start}, {self.steps} steps of {settings['batch_size']} windows of "
            f"{settings['window']} tokens in {self.minutes:.1f} minutes. Loss: {loss}",
            "",
            "On the held-out end of every file:",
            "",
            "| | bits per byte | KL to the ensemble, nats per token |",
            "|---|---|---|",
            f"| student before | {self.before.bits_per_byte:.4f} | {_number(self.before.kl)} |",
            f"| student after | {self.after.bits_per_byte:.4f} | {_number(self.after.kl)} |",
            *([] if reached is None else [f"| ensemble `{self.ensemble}` | {reached:.4f} | |"]),
            "",
            *self._about_answers(),
            f"{self.num_train_tokens} tokens were trained on, {self.num_held_out_tokens} held out. Of the sequences of "
            f"13 words that are held out {self.share_seen:.1%} stand in the rest, too.",
            "",
            "| text | SHA-256 |",
            "|---|---|",
            *(f"| {name} | {sha256} |" for name, sha256 in self.files.items()),
            "",
            f"Teacher: `{_entry(self.teacher)}`",
            "",
            f"Settings: `{_entry(settings)}`",
            "",
            "Made by `ensemble distill` with "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
            + ".",
        ]
        if has_figure:
            lines += ["", f"![Both losses over the steps]({FIGURE_FILE})"]
        return "\n".join(lines) + "\n"

    def _about_answers(self) -> list[str]:
        if not self.answers:
            return []
        how = "with its distributions" if self.has_targets else "as plain text"
        return [
            f"`{self.ensemble}` answered prompts, and what it answered was taught {how}; losses, bits and bytes are of "
            "the answers alone, in the student's chat template:",
            "",
            "| prompts | asked | answers taught | held out | cut off | no answer | not asked, held out elsewhere |",
            "|---|---|---|---|---|---|---|",
            *(
                "| " + " | ".join([file, *map(str, one.model_dump().values())]) + " |"
                for file, one in self.answers.items()
            ),
            "",
        ]


def drawn(losses: Sequence[StepLosses]) -> str | None:
    """Both losses over the steps, as SVG: each step, and a running mean. None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kinds = {"text (CLM)": ([one.clm for one in losses], _CLM)}
    if any(one.kl is not None for one in losses):
        kinds["teacher (KL)"] = ([one.kl or 0.0 for one in losses], _KL)
    steps = [one.step for one in losses]
    with rc_context(STYLE):
        figure = Figure(figsize=(4 * len(kinds), 3), layout="constrained")
        places = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, (name, (values, colour)) in zip(places, kinds.items(), strict=True):
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, _running_mean(values), color=colour, linewidth=1.5)
            axes.set_xlabel("step")
            axes.set_title(f"{name}, nats per token", fontsize=10)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return file.getvalue()


def _running_mean(values: Sequence[float]) -> list[float]:
    """Of up to a tenth of all values, those before each."""
    width = max(1, len(values) // 10)
    parts = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _entry(settings: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None) + "}"
