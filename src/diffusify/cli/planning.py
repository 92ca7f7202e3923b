"""The command that tells what a training run will take: plan."""

import json
import shlex
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffusify.cli.making import Options, RecipeName, recipe_maker
from diffusify.cli.options import arguments, parse_options
from diffusify.cli.terminal import clear_errors, say, suggest
from diffusify.cli.writing import AsJson

if TYPE_CHECKING:
    from diffusify.planning.plan import Memory, Plan

PARTS = {
    "weights": "weights, float32",
    "copies": "weights computed with",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "activations": "activations",
    "logits": "logits and loss",
    "exchange": "gradients in exchange",
    "rest": "the rest, allowed for",
}


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder, config.json, .gguf file or pip:PACKAGE. Only its config is read."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens of text to train on: 65B, 300M, 1e9.")] = None,
    gpus: Annotated[
        str, typer.Option(help="64xH100, RTX4090, A100-80GB, ... or cpu: this machine, measured in a second.")
    ] = "cpu",
    recipe: Annotated[
        RecipeName | None, typer.Option(help="block (usual), ar or mlm; a diffusion model goes on as its card says.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    batch: Annotated[int | None, typer.Option(help="Rows on each device at a time; unset: as many as fit.")] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank instead of all weights.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="To compute in: bfloat16, float16 or float32; unset: what suits the device.")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the device's peak, as 0.4; unset: what is usual on it.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of an hour of one device.")] = None,
    option: Options = None,
    paper: Annotated[bool, typer.Option("--paper", help="DiffuGPT's and DiffuLLaMA's own runs, planned.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a training run will take, before anything is spent: parameters, FLOPs, memory, sharding, hours, cost.

    One step is counted on a network without weights, operation by operation, for any family that can be adapted.
    """
    with clear_errors():
        from diffusify.models.lora import Lora
        from diffusify.planning.devices import Fleet, read_amount
        from diffusify.planning.plan import plan as run

        if paper:
            if model or tokens:
                raise ValueError("--paper plans the paper's own runs; leave MODEL and --tokens out")
            _papers(as_json)
            return
        if model is None or tokens is None:
            raise ValueError(
                "say what is to be trained, and on how much: diffusify plan MODEL --tokens 1B --gpus 8xH100"
            )
        amount, fleet = read_amount(tokens), Fleet.parse(gpus)
        make = recipe_maker(recipe or RecipeName.block)
        adapters = arguments(Lora, "alpha", "embeddings") if lora is not None else {}
        made, low = parse_options(option or [], arguments(make), adapters)
        with say.status("counting a step"):
            found = run(
                model,
                tokens=amount,
                gpus=fleet,
                recipe=make(**made) if recipe or made else None,
                length=length,
                batch=batch,
                lora=None if lora is None else Lora(lora, **low),
                dtype=dtype,
                utilisation=utilisation,
                price=price,
            )
        if as_json:
            print(json.dumps(found.to_dict()))
            return
        _show(found)
        again = [f"diffusify plan {shlex.quote(model)} --tokens {tokens}"]
        again += [f"--recipe {recipe.value}"] if recipe else []
        again += [f"-o {shlex.quote(pair)}" for pair in option or []]
        if found.layout is None:
            given = {"--gpus": gpus, "--length": length, "--batch": batch, "--lora": lora, "--price": price}
            for remedy in found.remedies[:1]:
                name, _, value = remedy.option.partition(" ")
                words = {key: v for key, v in (given | {name: value}).items() if v is not None}
                suggest(" ".join([*again, *(f"{key} {value}" for key, value in words.items())]))
            return
        suggest(_command(found, recipe, option or []))


def _command(found: "Plan", recipe: RecipeName | None, pairs: list[str]) -> str:
    """The run itself, with a place to name its data."""
    count, subject = found.fleet.count, found.subject
    start = "diffusify"
    if count > 1:
        nodes, each = max(1, -(-count // 8)), min(count, 8)
        start = f"torchrun --nproc-per-node {each}" + (f" --nnodes {nodes}" if nodes > 1 else "") + " -m diffusify"
    settings = [f"length={subject.length}", f"per_device_train_batch_size={found.rows}"]
    settings += ["activation_checkpointing=true"] if found.checkpointing else []
    settings += {"ZeRO-2": ["fsdp=shard_grad_op"], "ZeRO-3": ["fsdp=full_shard"]}.get(found.sharding, [])
    words = ["adapt" if subject.lora is None else "tune", shlex.quote(found.model), "--data DATA"]
    words += [f"--recipe {recipe.value}"] if recipe else []
    words += [f"--lora {subject.lora.rank}"] if subject.lora else []
    words += [f"--steps {found.steps}", *(f"-o {shlex.quote(pair)}" for pair in [*pairs, *settings])]
    return " ".join([start, *words])


def _show(found: "Plan") -> None:
    screen, subject, sizes = Console(highlight=False), found.subject, found.sizes
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    of = f"{amount(sizes.embeddings)} embeddings, {amount(sizes.body)} body"
    some = f"; {amount(sizes.trained)} trained" if sizes.trained < sizes.total else ""
    facts.add_row("parameters", f"{amount(sizes.total)} ({of}{some})")
    what = f"{found.flops_per_token:.3g} for each token, {found.flops:.3g} in all"
    facts.add_row("FLOPs", f"{what} ({amount(found.tokens)} tokens, {subject.recipe.name}, rows of {subject.length})")
    device, rate = found.fleet.device, found.fleet.device.peak(subject.dtype) / 1e12
    at = f"{rate:,.3g} TFLOP/s in {subject.dtype}, {device.memory:.1f} GiB each"
    facts.add_row("devices", f"{found.fleet} ({at})")
    if found.layout is None:
        least = min(found.memory.total, found.memory_checkpointed.total)
        facts.add_row(
            "fits", f"[red]no[/]: {gib(least)} GiB are needed on each for {found.rows} x {subject.length} tokens"
        )
    else:
        how = found.sharding + (", activation checkpointing" if found.checkpointing else "")
        facts.add_row("layout", f"{how}; {found.rows} rows on each at a time (up to {found.layout.rows} fit)")
        time = (
            f"{lasting(found.hours)} at {found.utilisation:.0%} of the peak ({found.tokens_per_second:,.0f} tokens/s)"
        )
        facts.add_row("time", f"{time}; {found.steps:,} steps")
        hours = f"{found.device_hours:,.3g} device hours"
        facts.add_row("cost", hours if found.cost is None else f"{found.cost:,.2f} ({hours} at {found.price:g})")
    screen.print(facts)
    screen.print(_memory_table(found.memory, found.memory_checkpointed))
    if found.layout is None:
        screen.print("what would make it fit:" if found.remedies else "nothing tried here would make it fit")
        for remedy in found.remedies:
            screen.print(f"  {remedy.option:24} {remedy.what}", markup=False)


def _memory_table(kept: "Memory", checkpointed: "Memory") -> Table:
    table = Table("GiB on each device", "kept", "checkpointed", box=None, pad_edge=False, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, title in PARTS.items():
        table.add_row(title, *(gib(getattr(memory, part)) for memory in (kept, checkpointed)))
    table.add_row("total", gib(kept.total), gib(checkpointed.total), style="bold")
    return table


def _papers(as_json: bool) -> None:
    """The first paper's runs as it tells of them, and as a plan does."""
    from diffusify.planning.paper_runs import RUNS

    with say.status("counting steps of three runs"):
        plans = [run.plan() for run in RUNS]
    if as_json:
        print(json.dumps([found.to_dict() | {"paper": run.facts()} for run, found in zip(RUNS, plans, strict=True)]))
        return
    told = Table("", "steps", "rows a step", "tokens a row", "tokens", "hardware", "layout", box=None, pad_edge=False)
    ours = Table(
        "", "parameters", "FLOPs/token", "FLOPs", "hours", "layout", "rows a device", "GiB", box=None, pad_edge=False
    )
    for run, found in zip(RUNS, plans, strict=True):
        told.add_row(
            run.name,
            f"{run.steps:,}",
            f"{run.batch:,}",
            f"{run.length:,}",
            amount(run.tokens),
            run.hardware,
            run.layout,
        )
        how = found.sharding + (", checkpointed" if found.checkpointing else "")
        memory = found.memory_checkpointed if found.checkpointing else found.memory
        most = f"{found.rows} of {run.rows}"
        ours.add_row(
            run.name, amount(found.sizes.total), f"{found.flops_per_token:.3g}", f"{found.flops:.3g}",
            f"{found.hours:,.0f}", how, most, gib(memory.total),
        )  # fmt: skip
    screen = Console(highlight=False)
    screen.print("[bold]as the paper tells[/] (arXiv 2410.17891; how long they took is not told)", told, "")
    screen.print("[bold]as planned[/] (rows a device: what fits at a time, of the paper's)", ours)
    suggest("diffusify plan gpt2 --recipe ar --tokens 131B --length 512 --gpus 8xA100-80GB")


def amount(number: int | float) -> str:
    """Three digits and a unit: 65B, 124M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def lasting(hours: float) -> str:
    """A time as people say it."""
    if hours < 1:
        return f"{60 * hours:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:,.3g} days"
