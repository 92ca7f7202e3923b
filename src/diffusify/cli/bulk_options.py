"""Generation for whole files, which `diffusify generate` and `diffusify infill` share: --input and --output."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffusify.cli.sampling_options import load_model
from diffusify.cli.terminal import console

if TYPE_CHECKING:
    from diffusify.serving.bulk.bulk_output import BulkProgress
    from diffusify.serving.bulk.bulk_records import BulkSettings

_PANEL = "Files"

Input = Annotated[
    Path | None,
    typer.Option(
        "--input",
        help="File or folder of records to generate texts for, many at once: .jsonl, .csv, .parquet, ..., or .txt with "
        "a text in each line. Fields of a record with the names of options override them.",
        rich_help_panel=_PANEL,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="File of JSON lines for the results of --input, in the same order. The same command continues it after an "
        "interruption.",
        rich_help_panel=_PANEL,
    ),
]
BatchTokens = Annotated[
    int,
    typer.Option(
        help="Maximum number of tokens (prompts and results) of the records of --input that are generated at once. "
        "Limits the memory of the KV cache.",
        rich_help_panel=_PANEL,
    ),
]


def is_bulk(source: Path | None, output: Path | None, **single: Any) -> bool:
    """Whether --input and --output are given. ValueError for one alone, or beside what is for a `single` text."""
    if (source is None) != (output is None):
        raise ValueError("--input and --output are the files of one run; give both or neither")
    if source is not None and (given := [name for name, value in single.items() if value]):
        raise ValueError(f"{given[0]} is for a single text; leave out {given[0]}, or --input and --output")
    return source is not None


def generate_bulk(
    model: str,
    source: Path | None,
    output: Path | None,
    settings: "BulkSettings",
    *,
    batch_tokens: int,
    device: str,
    dtype: str,
) -> None:
    """Generate the texts of a file of records, with a progress bar. The exit code is 1 if no record had a result."""
    assert source is not None and output is not None, "checked by is_bulk"
    try:
        from diffusify.serving.bulk.bulk_output import check_output, generate_file
        from diffusify.serving.bulk.bulk_records import BulkInput
    except ImportError as error:
        raise ValueError(f"--input needs `pip install 'diffusify[serve]'` ({error.name} is missing)") from error
    if batch_tokens < 1:
        raise ValueError(f"--batch-tokens {batch_tokens} must be at least 1 token")
    check_output(output)
    records = BulkInput(source, settings.allowed[0])
    console.print(f"{source}: {records.count:,} records", soft_wrap=True)
    lm = load_model(model, device=device, dtype=dtype)
    results = _show_progress(generate_file(lm, records, output, settings, tokens=batch_tokens)).results
    failed = f", {results}" if results.corrupt else ""
    console.print(f"saved {results.records - results.corrupt:,} results in {output}{failed}", soft_wrap=True)
    if results.corrupt == results.records:
        raise typer.Exit(1)


def _show_progress(steps: "Iterator[BulkProgress]") -> "BulkProgress":
    """Show a progress bar, and return the last of the steps."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        first = step = next(steps)
        task = progress.add_task("", total=first.total, completed=first.results.records, rate="")
        for step in steps:
            seconds = progress.tasks[0].elapsed or 0.0
            rate = f"{step.tokens / max(seconds, 1e-9):.0f} tokens/s"
            progress.update(task, completed=step.results.records, rate=rate)
    return step
