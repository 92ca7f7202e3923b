"""Options that the training commands (`adapt`, `tune`, `plan`) share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

Minutes = Annotated[
    float | None,
    typer.Option(help="Training time in minutes, instead of --steps.", rich_help_panel="Training length"),
]
LoraRank = Annotated[
    int | None,
    typer.Option("--lora", metavar="RANK", help="Train LoRA adapters of this rank.", show_default="train all weights"),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        metavar="KEY=VALUE",
        help="Set a field of the recipe (such as size), of the data (length, held_out, seed, start_token, end_token, "
        "mask_token_id), of LoRA (alpha, embeddings, load_in_4bit) or of transformers.TrainingArguments, for example "
        "-o learning_rate=1e-4. Can be given several times.",
    ),
]


class RecipeName(StrEnum):
    """The recipes of `diffusify.models.recipes`."""

    draft = "draft"
    block = "block"
    ar = "ar"
    mlm = "mlm"


def recipe_function(name: RecipeName) -> Any:
    """The function that makes the recipe of this name."""
    from diffusify.models import recipes

    return getattr(recipes, name.value)


def default_recipe_name(base: str) -> RecipeName:
    """The recipe that a base gets if none is chosen."""
    from diffusify.models.loading import is_masked_lm
    from diffusify.models.recipes import default_recipe

    return RecipeName(default_recipe(masked=is_masked_lm(base)).name)


def data_source(sources: list[str] | None) -> str:
    """One data source for all values of --data: several of them become a mixture. ValueError if there is none."""
    if not sources:
        raise ValueError(
            "--data is missing; give a file or folder, or builtin:pydoc (Python's own documentation) for `adapt`"
        )
    return sources[0] if len(sources) == 1 else ",".join(part if "*" in part else f"1*{part}" for part in sources)


def folder_name(source: str) -> str:
    """A short name for a model, for folders in runs/."""
    return Path(source).name.replace(":", "-")
