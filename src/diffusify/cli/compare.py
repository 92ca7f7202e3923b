"""`diffusify compare`: compare two evaluation reports."""

import json
from pathlib import Path
from typing import Annotated

import typer

from diffusify.cli.eval import print_table
from diffusify.cli.options import AsJson
from diffusify.cli.terminal import report_errors


def compare(
    report: Annotated[Path, typer.Argument(help="Folder of a report that `diffusify eval` saved.")],
    other: Annotated[Path, typer.Argument(help="Folder of a second report on the same tasks.")],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluation reports item by item.

    Prints the scores of both, and their difference with a 95% confidence interval for each task that both have.
    """
    with report_errors():
        from dataclasses import asdict

        from diffusify.evaluation.evaluate import difference, read_scores, score_row
        from diffusify.evaluation.html_report import scores_table

        first, second = read_scores(report / "model"), read_scores(other / "model")
        shared = [task for task in first if task in second]
        if not shared:
            raise ValueError(f"{report} and {other} have no task in common")
        differences = [difference(task, first[task], second[task]) for task in shared]
        if as_json:
            print(json.dumps([asdict(one) for one in differences]))
            return
        rows, other_rows = ([score_row(task, scores[task]) for task in shared] for scores in (first, second))
        print_table(*scores_table(rows, other_rows, differences, ("report", "other")))
