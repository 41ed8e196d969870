"""Where the rows of `ensemble batch` come from and where its answers go, as the options say it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ensemble_server.server.cli.batch_options import RequestOptions, parsed, summarised

if TYPE_CHECKING:
    from ensemble_server.server.batch.file_job import FileJob
    from ensemble_server.server.batch.job.rows import Url
    from ensemble_server.server.batch.results.outputs import OutputForm, OutputFormat
    from ensemble_server.server.batch.results.submission import SampleSubmission
    from ensemble_server.server.batch.source.records import SourceKind

STDIO = Path("-")
FOLDER_TEMPLATE = "{{ text }}"  # of a folder of texts, if none is given


@dataclass(frozen=True)
class InputOptions:
    source: Path
    format: SourceKind | None
    template: str | None
    system: str | None
    id_column: str | None
    url: Url | None
    shard: str | None

    def file_job(self, requests: RequestOptions, *, seed: int, stack: ExitStack) -> FileJob:
        """The job of this input. Standard input is read to its end into a file that goes when `stack` is closed."""
        from ensemble_server.server.batch.file_job import FileJob
        from ensemble_server.server.batch.placement.shards import Shard
        from ensemble_server.server.batch.source.inputs import Recipe
        from ensemble_server.server.batch.source.records import kind_of_source
        from ensemble_server.server.batch.source.template import PromptTemplate

        kind = kind_of_source(self.source, self.format or ("jsonl" if self.source == STDIO else None))
        text = FOLDER_TEMPLATE if kind == "folder" and self.template is None else self.template
        if text is None and kind != "jsonl":
            raise typer.BadParameter(f"{kind} holds columns; say what is asked of them", param_hint="--template")
        if text is None and self.id_column is not None:
            raise typer.BadParameter("rows without --template name themselves: custom_id", param_hint="--id-column")
        template = PromptTemplate.read(text, name="--template") if text is not None else None
        system = PromptTemplate.read(self.system, name="--system") if self.system is not None else None
        stated = {
            "--input-format": kind,
            "--template": template and summarised(template.source),
            "--system": system and summarised(system.source),
            "--id-column": self.id_column,
            "--url": self.url,
        }
        options = {flag: value for flag, value in stated.items() if value is not None} | requests.stated()
        recipe = Recipe(
            url=self.url,
            template=template,
            system=system,
            id_column=self.id_column,
            defaults=requests.defaults(),
            overrides=requests.overrides(),
            grid=requests.grid(),
        )
        source = _spooled(stack) if self.source == STDIO else self.source
        job = FileJob(source, kind, recipe, options, seed, parsed("--shard", Shard.parse, self.shard))
        if (wrong := job.lacks_id_column()) is not None:
            raise typer.BadParameter(wrong, param_hint="--id-column")
        return job


@dataclass(frozen=True)
class OutputOptions:
    output: Path
    format: OutputFormat | None
    columns: str | None
    zipped: bool
    sample_submission: Path | None
    fallback: str
    job: Path | None

    def __post_init__(self) -> None:
        if self.is_zipped and self.output == STDIO:
            raise typer.BadParameter("needs a file as its output", param_hint="--zip")
        if self.columns is not None and self._format != "csv":
            raise typer.BadParameter("belongs to --format csv", param_hint="--columns")

    @property
    def is_zipped(self) -> bool:
        return self.zipped or self.output.suffix == ".zip"

    @property
    def path(self) -> Path:
        """--zip -o answers.csv -> answers.csv.zip"""
        add = self.is_zipped and self.output.suffix != ".zip"
        return self.output.with_name(f"{self.output.name}.zip") if add else self.output

    @property
    def _format(self) -> OutputFormat:
        if self.format is not None:
            return self.format
        return "csv" if ".csv" in self.output.suffixes[-2:] else "jsonl"

    def sample(self, job: FileJob) -> SampleSubmission | None:
        """The sample submission, if there is one and this job can be held against it."""
        if self.sample_submission is None:
            return None
        from ensemble_server.server.batch.results.submission import SampleSubmission

        hint = "--sample-submission"
        if (num_cells := len(job.recipe.grid.cells)) > 1:
            raise typer.BadParameter(
                f"a submission has one row for each id, this grid has {num_cells}; write JSONL, then vote",
                param_hint=hint,
            )
        if job.shard is not None:
            raise typer.BadParameter("a shard has part of the rows; check the merged job", param_hint=hint)
        return SampleSubmission.read(self.sample_submission)

    def form(self, sample: SampleSubmission | None) -> OutputForm:
        """How the output is written. Columns must be those of the sample, which says itself what two columns show."""
        from ensemble_server.server.batch.results.columns import check_batch_columns, parse_columns
        from ensemble_server.server.batch.results.outputs import OutputForm

        if self._format == "jsonl":
            return OutputForm("jsonl", is_zipped=self.is_zipped)
        if self.columns is not None:
            columns = parse_columns(self.columns)
        else:
            columns = sample.columns() if sample is not None else parse_columns("custom_id,content")
        check_batch_columns(columns)
        if sample is not None:
            sample.check_columns(columns)
        return OutputForm("csv", columns, self.fallback, self.is_zipped)

    def job_file(self, stack: ExitStack) -> Path:
        """Where the job is kept: where --job says, else beside the output; that of standard output is not kept."""
        from ensemble_server.server.batch.job.store import job_path

        if self.job is not None:
            return self.job
        if self.output == STDIO:
            return Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answers.job"
        return job_path(self.path)


def _spooled(stack: ExitStack) -> Path:
    """Standard input as a file, which can be read more than once."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stdin"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path
