"""`ensemble batch`: a file of prompts in, a file of answers out; killed at any moment, the same command goes on.

Exit codes: 0 every row has an answer, 1 failed, 2 called wrongly, 3 finished and some rows have none (their output rows
say why), 130 interrupted; the same command continues.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from ensemble_server.server.cli.batch_files import STDIO, InputOptions, OutputOptions
from ensemble_server.server.cli.batch_options import RequestOptions, parsed
from ensemble_server.server.cli.completion import model_names
from ensemble_server.server.cli.paths import readable, text_file

INTERRUPTED = 130
INPUT, REQUESTS, OUTPUT, RUN = "What goes in", "What is asked", "What comes out", "How it runs"


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            callback=readable,
            help="JSONL of an OpenAI batch; with --template JSONL, CSV, TSV or Parquet of columns, or a folder of "
            "texts. - reads standard input.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The answers; the job itself is kept beside it as OUTPUT.job. - is standard output."
        ),
    ],
    config: Annotated[
        Path,
        typer.Option(
            "--config", "-c", exists=True, dir_okay=False, callback=text_file, help="The YAML file of the models."
        ),
    ],
    template: Annotated[
        str | None,
        typer.Option(help="Prompt as Jinja over the columns: a file, or the text itself.", rich_help_panel=INPUT),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, in the same way.", rich_help_panel=INPUT)] = None,
    id_column: Annotated[
        str | None,
        typer.Option(help="Column of the ids; else custom_id, id, or the row's number.", rich_help_panel=INPUT),
    ] = None,
    input_format: Annotated[
        Literal["jsonl", "csv", "tsv", "parquet"] | None,
        typer.Option(help="Where the file's name does not say it.", rich_help_panel=INPUT),
    ] = None,
    url: Annotated[
        Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify"] | None,
        typer.Option(help="What is done with a prompt; default: it is asked as a chat.", rich_help_panel=INPUT),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,...]",
            help="Several make a grid: every row for each.",
            rich_help_panel=REQUESTS,
            autocompletion=model_names,
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, rich_help_panel=REQUESTS)] = None,
    temperature: Annotated[
        str | None, typer.Option(metavar="NUMBER[,...]", help="Several make a grid.", rich_help_panel=REQUESTS)
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, rich_help_panel=REQUESTS)] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=128, help="Choices of each answer (n).", rich_help_panel=REQUESTS)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The job's; every row gets its own from it.", rich_help_panel=REQUESTS),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0-3,...", help="Seeds of the rows; several make a grid.", rich_help_panel=REQUESTS),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends an answer; may be given several times.", rich_help_panel=REQUESTS)
    ] = None,
    stop_when_decided: Annotated[
        Literal["number", "choice", "yes_no", "text"] | None,
        typer.Option(
            help="Take no more samples of a row once the vote on their answers is decided.", rich_help_panel=REQUESTS
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL,...",
            help="Classify: the probability of each label after the prompt. Implies --url /v1/classify.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    response_format: Annotated[
        str | None,
        typer.Option(help="json_object, or a JSON schema: a file or the text.", rich_help_panel=REQUESTS),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=JSON",
            help="Set any key of every body, even where a row has it: ensemble.explain=true.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    output_format: Annotated[
        Literal["jsonl", "csv"] | None,
        typer.Option("--format", help="Default: by the name of the output, else jsonl.", rich_help_panel=OUTPUT),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=SOURCE,...",
            help="Of a CSV: custom_id, content, finish_reason, error, sample, model, temperature, seed, or a path into "
            "the answer (usage.total_tokens); content|number extracts a number, choice, yes_no or text.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    zipped: Annotated[bool, typer.Option("--zip", help="Zip the output.", rich_help_panel=OUTPUT)] = False,
    sample_submission: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CSV whose columns, ids, order and count the output must have; checked before anything runs.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    fallback: Annotated[
        str, typer.Option(metavar="TEXT", help="What a CSV has where there is no answer.", rich_help_panel=OUTPUT)
    ] = "",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Rows at once; default: what the engine takes.", rich_help_panel=RUN)
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="2h|1h30m|90s", help="Stop then, with the best so far written.", rich_help_panel=RUN),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            metavar="4h45m",
            help="Shared out among all rows; what one leaves over goes to the rest.",
            rich_help_panel=RUN,
        ),
    ] = None,
    per_row_max: Annotated[
        str | None, typer.Option(metavar="90s", help="The most that one row may take.", rich_help_panel=RUN)
    ] = None,
    residency: Annotated[
        Literal["resident", "sequential"],
        typer.Option(
            help="sequential: load one member, run all rows, free it, load the next (ensembles of texts only).",
            rich_help_panel=RUN,
        ),
    ] = "resident",
    ray: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="WORKERS",
            help="Answer on a Ray cluster (the one of RAY_ADDRESS, else a local one), with the models in each worker.",
            rich_help_panel=RUN,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Answer only part I of N, for N machines; `batch merge` joins.", rich_help_panel=RUN
        ),
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Run failed rows again.", rich_help_panel=RUN)
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the job's answers and begin again.", rich_help_panel=RUN)
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="The input has changed: keep the answers of rows that have not.", rich_help_panel=RUN
        ),
    ] = False,
    max_errors: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Stop after N failed rows; 0 never. Default: after 20 if none was answered.",
            rich_help_panel=RUN,
        ),
    ] = None,
    job: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Where the job is kept.", rich_help_panel=RUN)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything and estimate tokens and time; no answers.", rich_help_panel=RUN
        ),
    ] = False,
    probe: Annotated[
        int, typer.Option(min=0, help="Rows that --dry-run answers, to measure.", rich_help_panel=RUN)
    ] = 4,
    no_progress: Annotated[bool, typer.Option("--no-progress", rich_help_panel=RUN)] = False,
) -> None:
    """Answer every row of a file. Interrupted or killed, the same command goes on where it stopped.

    Exit codes: 0 every row has an answer, 1 failed, 2 called wrongly, 3 some rows have none, 130 interrupted.
    `ensemble batch merge` joins the outputs of shards; a file of that name is ./merge.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a batch never asks a hub
    requests = RequestOptions(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seeds=seeds,
        samples=samples,
        stop=tuple(stop or ()),
        stop_when_decided=stop_when_decided,
        response_format=response_format,
        labels=labels,
        set=tuple(set_ or ()),
    )
    url = "/v1/classify" if labels is not None and url is None else url
    if seed is not None and seeds is not None:
        raise typer.BadParameter("--seeds gives every row its seed already", param_hint="--seed")
    if restart and extend:
        raise typer.BadParameter("keeps answers, --restart forgets them; give one", param_hint="--extend")
    if residency == "sequential" and (time_budget is not None or per_row_max is not None):
        raise typer.BadParameter("one member after the other, rows cannot be limited one by one; use --deadline")
    limits = (deadline, time_budget, per_row_max, concurrency)
    if ray is not None and (residency != "resident" or any(limit is not None for limit in limits)):
        raise typer.BadParameter("takes no limits of time, no --concurrency and no --residency", param_hint="--ray")
    if source != STDIO and not source.exists():
        raise typer.BadParameter(f"{str(source)!r} does not exist", param_hint="INPUT")
    if output != STDIO and output.exists() and source != STDIO and output.samefile(source):
        raise typer.BadParameter("would overwrite its own input", param_hint="--output")

    from ensemble_server.server.batch.running.budget import parse_duration
    from ensemble_server.server.cli.batch_answer import BatchRun
    from ensemble_server.server.cli.batch_run import run_job
    from ensemble_server.server.config.loading import load_config

    limits_s = {
        "deadline_s": parsed("--deadline", parse_duration, deadline),
        "time_budget_s": parsed("--time-budget", parse_duration, time_budget),
        "per_row_max_s": parsed("--per-row-max", parse_duration, per_row_max),
    }
    loaded = load_config(config)
    requests.check_models(loaded)
    with ExitStack() as stack:
        try:
            inputs = InputOptions(source, input_format, template, system, id_column, url, shard)
            file_job = inputs.file_job(requests, seed=seed or 0, stack=stack)
            outputs = OutputOptions(output, output_format, columns, zipped, sample_submission, fallback, job)
            sample = outputs.sample(file_job)
            run = BatchRun(
                config=loaded,
                job=file_job,
                job_file=outputs.job_file(stack),
                output=outputs.path,
                form=outputs.form(sample),
                sample=sample,
                concurrency=concurrency,
                **limits_s,
                retry_errors=retry_errors,
                restart=restart,
                extend=extend,
                max_errors=max_errors,
                has_progress=not no_progress,
                is_sequential=residency == "sequential",
                ray_workers=ray,
            )
            if dry_run:
                from ensemble_server.server.cli.batch_dry_run import dry_run_job

                code = dry_run_job(run, num_probes=probe)
            else:
                code = run_job(run)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command continues", err=True)
            code = INTERRUPTED
    raise typer.Exit(code)
