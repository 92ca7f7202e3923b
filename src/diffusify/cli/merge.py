"""`diffusify merge`: merge LoRA adapters into their base model."""

from pathlib import Path
from typing import Annotated

import typer

from diffusify.cli.terminal import console, report_errors, suggest


def merge(
    adapters: Annotated[
        str, typer.Argument(help="Folder with LoRA adapters (made by `diffusify adapt` or `tune` with --lora).")
    ],
    out: Annotated[Path, typer.Option(help="Folder where the merged model is saved.")],
) -> None:
    """Merge LoRA adapters into their base model and save the full weights."""
    with report_errors():
        from diffusify.models.saving import merge_adapters

        console.print(f"saved {merge_adapters(adapters, out)}", soft_wrap=True)
        suggest(f"diffusify show {out}")
