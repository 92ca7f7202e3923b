"""Commands that use a model: generate, infill, chat, show."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from diffusify.cli.options import read_value
from diffusify.cli.terminal import clear_errors, converse, write

if TYPE_CHECKING:
    from diffusify.sampling.generation import DiffusionLM
    from diffusify.sampling.settings import SamplingConfig


class CacheKind(StrEnum):
    exact = "exact"
    prefix = "prefix"
    dual = "dual"
    none = "none"


Model = Annotated[str, typer.Argument(help="A folder that `diffusify adapt`, `tune` or `import` made.")]
Room = Annotated[int | None, typer.Option(help="Room for so many tokens; unset: as the model tells, else 64.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps in all; unset: as the model's card says.")]
Likely = Annotated[float | None, typer.Option(help="Write every token likelier than this at once, as 0.9.")]
Rule = Annotated[
    str | None,
    typer.Option(help="Unmask, Ancestral or Reparam, or JSON as in the card; unset: the card's.", metavar="POLICY"),
]
Heat = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens that hold this probability.")]
Window = Annotated[int | None, typer.Option(help="Write so many tokens at a time from left to right (ar, mlm).")]
Guidance = Annotated[float, typer.Option(help="Above 0: fit the prompt more (classifier-free; twice the work).")]
Penalty = Annotated[float, typer.Option(help="Above 1: repeat less.")]
Cache = Annotated[
    CacheKind, typer.Option(help="exact: finished blocks; prefix, dual: approximate, with --window (ar); none.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
Exact = Annotated[bool, typer.Option("--lossless", help="What left-to-right decoding would write, in fewer forwards.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show the text filling in; colour is confidence.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; standard input when left out.")] = None,
    max_new_tokens: Room = None,
    steps: Steps = None,
    threshold: Likely = None,
    policy: Rule = None,
    temperature: Heat = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    guidance: Guidance = 0.0,
    window: Window = None,
    cache: Cache = CacheKind.exact,
    seed: Seed = 0,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Write from nothing, without a prompt.")
    ] = False,
    lossless: Exact = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    with clear_errors():
        settings = sampling(
            policy,
            steps=steps,
            threshold=threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            guidance=guidance,
            window=window,
            cache=cache.value,
            seed=seed,
            lossless=lossless,
        )
        if unconditional and prompt:
            raise ValueError("--unconditional writes without a prompt; leave one of the two out")
        if prompt is None and not unconditional and sys.stdin.isatty():
            raise ValueError("no prompt: give one, pipe one in, or use --unconditional")
        text = "" if unconditional else sys.stdin.read() if prompt is None else prompt
        lm = open_model(model)
        write(lm, lm.continuing([text], max_new_tokens, settings), watch=watch, as_json=as_json)


def infill(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(help=r"Text with holes: [[8]] is room for 8 tokens, [[3-12]] for 3 to 12; \[[ is a plain [[."),
    ],
    steps: Steps = None,
    threshold: Likely = None,
    policy: Rule = None,
    temperature: Heat = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    guidance: Guidance = 0.0,
    window: Window = None,
    cache: Cache = CacheKind.exact,
    seed: Seed = 0,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Fill the holes of a text, with a view of both sides."""
    with clear_errors():
        from diffusify.text.prompts import parse_holes

        settings = sampling(
            policy,
            steps=steps,
            threshold=threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            guidance=guidance,
            window=window,
            cache=cache.value,
            seed=seed,
        )
        parse_holes(text)
        lm = open_model(model)
        write(lm, lm.infilling([text], settings), watch=watch, as_json=as_json)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.")] = None,
    max_new_tokens: Room = None,
    steps: Steps = None,
    threshold: Likely = None,
    policy: Rule = None,
    temperature: Heat = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    guidance: Guidance = 0.0,
    window: Window = None,
    cache: Cache = CacheKind.exact,
    seed: Seed = 0,
    lossless: Exact = False,
) -> None:
    """Talk with a model, its answers filling in live."""
    with clear_errors():
        settings = sampling(
            policy,
            steps=steps,
            threshold=threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            guidance=guidance,
            window=window,
            cache=cache.value,
            seed=seed,
            lossless=lossless,
        )
        converse(open_model(model), settings, max_new_tokens, system)


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


def sampling(policy: str | None, **settings: Any) -> "SamplingConfig":
    """Settings, refused before a model is opened."""
    from diffusify.config import from_plain
    from diffusify.diffusion.policies import Policy
    from diffusify.sampling.settings import SamplingConfig

    return SamplingConfig(
        policy=None if policy is None else from_plain(read_value(policy), Policy, "--policy"), **settings
    )


def open_model(folder: str, **more: Any) -> "DiffusionLM":
    from diffusify.sampling.generation import DiffusionLM

    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; make a model with `diffusify adapt BASE --out {folder}`")
    return DiffusionLM.from_pretrained(folder, **more)
