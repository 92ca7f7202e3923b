"""Commands that use a model: generate, infill, chat, show."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from diffusify.cli.options import read_value
from diffusify.cli.remote import WISHES, Remote
from diffusify.cli.terminal import answer_live, clear_errors, converse, write

if TYPE_CHECKING:
    from diffusify.sampling.diffusion_lm import DiffusionLM
    from diffusify.sampling.sampling_config import SamplingConfig


Model = Annotated[
    str,
    typer.Argument(help="A folder that `diffusify adapt`, `tune` or `import` made, or a name such as smollm2-block."),
]
Room = Annotated[int | None, typer.Option(help="Room for so many tokens; unset: as the model tells, else 64.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps in all; unset: as the model's card says.")]
Likely = Annotated[float | None, typer.Option(help="Write every token likelier than this at once, as 0.9.")]
MaskMod = Annotated[
    str | None,
    typer.Option(help="Unmask, Ancestral or Reparam, or JSON as in the card; unset: the card's.", metavar="POLICY"),
]
Heat = Annotated[float | None, typer.Option(help="0 takes the likeliest token (so if unset).")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the fewest tokens that hold this probability.")]
Window = Annotated[int | None, typer.Option(help="Write so many tokens at a time from left to right (ar, mlm).")]
Guidance = Annotated[float | None, typer.Option(help="Above 0: fit the prompt more (classifier-free; twice the work).")]
Penalty = Annotated[float | None, typer.Option(help="Above 1: repeat less.")]
Form = Annotated[str | None, typer.Option(help="A regular expression that what is written matches as a whole.")]
Cache = Annotated[
    Literal["exact", "prefix", "dual", "none"] | None,
    typer.Option(help="exact (usual): finished blocks; prefix, dual: approximate, with --window (ar); none."),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text; unset: 0.")]
Ready = Annotated[
    Literal["quality", "balanced", "fast"] | None,
    typer.Option(help="Settings that suit the model; options change them."),
]
File = Annotated[
    Path | None, typer.Option(help="Settings that `SamplingConfig.save` wrote; options change them.", metavar="JSON")
]
Near = Annotated[
    float | None, typer.Option(help="Keep drafts so many nats less likely than the left-to-right choice; 0: lossless.")
]
Exact = Annotated[bool, typer.Option("--lossless", help="What left-to-right decoding would write, in fewer forwards.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show the text filling in; colour is confidence.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; standard input when left out.")] = None,
    max_new_tokens: Room = None,
    preset: Ready = None,
    settings: File = None,
    steps: Steps = None,
    threshold: Likely = None,
    policy: MaskMod = None,
    temperature: Heat = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    guidance: Guidance = None,
    regex: Form = None,
    window: Window = None,
    cache: Cache = None,
    seed: Seed = None,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Write from nothing, without a prompt.")
    ] = False,
    lossless: Exact = False,
    tolerance: Near = None,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    with clear_errors():
        chosen = sampling(model, locals())
        if unconditional and prompt:
            raise ValueError("--unconditional writes without a prompt; leave one of the two out")
        if prompt is None and not unconditional and sys.stdin.isatty():
            raise ValueError("no prompt: give one, pipe one in, or use --unconditional")
        text = "" if unconditional else sys.stdin.read() if prompt is None else prompt
        lm = open_model(model)
        write(lm, lm.prepare_generation([text], max_new_tokens, chosen), watch=watch, as_json=as_json)


def infill(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(help=r"Text with holes: [[8]] is room for 8 tokens, [[3-12]] for 3 to 12; \[[ is a plain [[."),
    ],
    preset: Ready = None,
    settings: File = None,
    steps: Steps = None,
    threshold: Likely = None,
    policy: MaskMod = None,
    temperature: Heat = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    guidance: Guidance = None,
    regex: Form = None,
    window: Window = None,
    cache: Cache = None,
    seed: Seed = None,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Fill the holes of a text, with a view of both sides."""
    with clear_errors():
        from diffusify.text.prompts import parse_holes

        chosen = sampling(model, locals(), holes=True)
        parse_holes(text)
        lm = open_model(model)
        write(lm, lm.prepare_infilling([text], chosen), watch=watch, as_json=as_json)


def chat(
    model: Annotated[str | None, typer.Argument(help="A model's folder; with --url, its name there.")] = None,
    url: Annotated[str | None, typer.Option(help="Where `diffusify serve` listens, as http://127.0.0.1:8000.")] = None,
    key: Annotated[str | None, typer.Option(help="The server's key.", envvar="DIFFUSIFY_KEY")] = None,
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.")] = None,
    max_new_tokens: Room = None,
    preset: Ready = None,
    settings: File = None,
    steps: Steps = None,
    threshold: Likely = None,
    policy: MaskMod = None,
    temperature: Heat = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    guidance: Guidance = None,
    regex: Form = None,
    window: Window = None,
    cache: Cache = None,
    seed: Seed = None,
    lossless: Exact = False,
    tolerance: Near = None,
) -> None:
    """Talk with a model, its answers filling in live; or with one that is served."""
    with clear_errors():
        options = locals()
        if url is not None:
            there = Remote(url, key)
            wishes = {name: options[name] for name in WISHES if options[name] is not None}
            wishes |= {"tolerance": 0.0} if lossless else {}
            wishes |= {"max_tokens": max_new_tokens} if max_new_tokens else {}
            name = model or there.models()[0]
            converse(lambda messages: there.answer(messages, model=name, **wishes), system)
            return
        if model is None:
            raise ValueError("no model: give a folder, or --url of a server")
        chosen, lm = sampling(model, options), open_model(model)
        converse(lambda messages: answer_live(lm, messages, max_new_tokens, chosen), system)


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


def sampling(model: str, options: dict[str, Any], *, holes: bool = False) -> "SamplingConfig":
    """The settings of a command that continues a text, or fills its `holes`, before weights are read.

    They are a preset's or a file's, and what the command's options change.
    """
    from dataclasses import fields, replace

    from diffusify.config import DiffusionConfig, from_plain
    from diffusify.diffusion.policies import Policy
    from diffusify.models.bundled import resolve_model
    from diffusify.sampling.sampling_config import SamplingConfig

    if options["preset"] and options["settings"]:
        raise ValueError(f"--preset {options['preset']} and --settings {options['settings']}: give one of the two")
    start = SamplingConfig()
    if options["preset"]:
        card = DiffusionConfig.load(resolve_model(model))
        start = SamplingConfig.preset(options["preset"], card.infiller if holes else card)
    elif options["settings"]:
        start = SamplingConfig.load(options["settings"])
    names = [field.name for field in fields(SamplingConfig)]
    changes = {name: options[name] for name in names if options.get(name) is not None}
    if "policy" in changes:
        changes["policy"] = from_plain(read_value(changes["policy"]), Policy, "--policy")
    if options.get("lossless"):
        if "tolerance" in changes:
            raise ValueError("--lossless is --tolerance 0; give one of the two")
        changes["tolerance"] = 0.0
    return replace(start, **changes)


def open_model(folder: str, **more: Any) -> "DiffusionLM":
    from diffusify.models.bundled import bundled_models, resolve_model
    from diffusify.sampling.diffusion_lm import DiffusionLM

    if not resolve_model(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder; make a model with `diffusify adapt BASE --out {folder}`, or take one that is "
            f"here already: {', '.join(bundled_models()) or 'none'}"
        )
    return DiffusionLM.from_pretrained(folder, **more)
