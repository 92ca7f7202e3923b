"""`diffusify tune`: finetune a diffusion model on pairs of prompt and target, or on chats."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from diffusify.cli.options import argument_types, parse_options, training_argument_types, unescape
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
    *("max_corrupt", "max_skipped", "load_in_4bit"),
)


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a diffusion model or name of a bundled one, or a base model as for `diffusify adapt`."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training records: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a folder of such files, "
            "hub:NAME for a dataset of the Hub, or a weighted mixture such as 0.7*a.jsonl,0.3*b.jsonl. Can be given "
            "several times."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help=r"Template of the prompt, with the fields of a record in braces, such as 'German: {de}\nEnglish:'. "
            r"\n is a line break, and \\ a backslash: 'Is {a} \\neq {b}?'.",
            show_default="the chat template of the model",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Template of the target, such as ' {en}'. Required with --prompt."),
    ] = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="Recipe that turns a base model into a diffusion model; see `diffusify adapt --help`.",
            show_default="that of a diffusion model, else mlm for masked models and block for others",
        ),
    ] = None,
    lora: LoraRank = None,
    length_head: Annotated[
        bool,
        typer.Option(
            "--length-head",
            help="Also train a head that predicts the length of the target from the prompt (recipes ar and mlm).",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder where the model is saved.", show_default="runs/tuned-MODEL"),
    ] = None,
    option: Option = None,
    epochs: Annotated[
        float,
        typer.Option(
            help="Number of passes over the data, unless --steps or --minutes is given.",
            rich_help_panel="Training length",
        ),
    ] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of optimizer steps.", show_default="--epochs decides", rich_help_panel="Training length"
        ),
    ] = None,
    minutes: Minutes = None,
) -> None:
    """Finetune a diffusion model on prompts and targets, or on chats.

    A record is a chat (`messages`) or a pair of fields (`instruction` and `output`, `prompt` and `completion`,
    `question` and `answer`, ...). With --prompt and --target it can have any fields. Only targets and assistant
    messages are noised and count in the loss. To resume an interrupted run, give the same command again.
    """
    with report_errors():
        from diffusify.models.lora import Lora
        from diffusify.models.recipes import saved_recipe
        from diffusify.text.examples import Template
        from diffusify.training.tune import tune as run

        if (prompt is None) != (target is None):
            raise ValueError("--prompt and --target form one template; give both or neither")
        template = None if prompt is None or target is None else Template(unescape(prompt), unescape(target))
        own_recipe = None if recipe else saved_recipe(model)
        make_recipe = None if own_recipe else recipe_function(recipe or default_recipe_name(model))
        recipe_options, lora_options, tune_options, training_options = parse_options(
            option or [],
            argument_types(make_recipe) if make_recipe else {},
            argument_types(Lora, "alpha", "embeddings") if lora is not None else {},
            argument_types(run, *_RUN_OPTIONS),
            training_argument_types(),
        )
        folder = run(
            model,
            data_source(data),
            out or Path("runs") / f"tuned-{folder_name(model)}",
            template=template,
            recipe=make_recipe(**recipe_options) if make_recipe else None,
            lora=None if lora is None else Lora(lora, **lora_options),
            length_head=length_head,
            epochs=epochs,
            steps=steps,
            minutes=minutes,
            console=console,
            **tune_options,
            **training_options,
        )
        curve = folder / "curve.png"  # missing if nothing was evaluated
        console.print(f"saved {folder}" + f"  (loss curve: {curve})" * curve.is_file(), soft_wrap=True)
        first = f"diffusify chat {folder}"
        if template is not None:
            example = template.fill_prompt(dict.fromkeys(template.prompt_fields, "..."))
            first = f"diffusify generate {folder} {shlex.quote(example)}"
        suggest(first, f"diffusify merge {folder} --out {folder}-merged" if lora else f"diffusify show {folder}")
