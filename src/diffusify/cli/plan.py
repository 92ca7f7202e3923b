"""`diffusify plan`: estimate the memory, time and cost of a training run."""

import json
import shlex
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffusify.cli.options import AsJson, argument_types, parse_options
from diffusify.cli.terminal import console, report_errors, suggest
from diffusify.cli.training_options import LoraRank, RecipeName, default_recipe_name, recipe_function

if TYPE_CHECKING:
    from diffusify.planning.plan import Memory, Plan
    from diffusify.planning.reward_plan import RewardPlan

MEMORY_LABELS = {
    "weights": "weights (float32)",
    "copies": "weights in compute dtype",
    "gradients": "gradients",
    "optimizer": "AdamW moments",
    "activations": "activations",
    "logits": "logits and loss",
    "exchange": "communication buffers",
    "rest": "allowance for overhead",
}


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model to train: a Hugging Face Hub id, local folder, config.json, .gguf file or pip:PACKAGE. Only "
            "its config is read."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Number of training tokens, such as 65B, 300M or 1e9. Required with MODEL, or --answers."),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            help="Plan a run of `diffusify reinforce` instead, by the number of answers that it samples (steps x "
            "prompts x group) and their length in tokens, such as 6400x64. --length includes the prompt."
        ),
    ] = None,
    gpus: Annotated[
        str,
        typer.Option(
            help="Number and type of GPUs, such as 64xH100, RTX4090 or A100-80GB. cpu is the CPU of this machine, "
            "whose speed is measured in about a second."
        ),
    ] = "cpu",
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="Recipe to train with; see `diffusify adapt --help`.",
            show_default="that of a diffusion model; mlm for a masked language model, else block",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Sequence length in tokens.")] = 256,
    batch: Annotated[
        int | None, typer.Option(help="Number of sequences per device at a time.", show_default="as many as fit")
    ] = None,
    lora: LoraRank = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type to compute in: bfloat16, float16 or float32.", show_default="the best for the device"
        ),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            help="Share of the peak FLOP/s of the device that training reaches (MFU), such as 0.4.",
            show_default="typical for the device",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Price of one device for one hour.", show_default="cost is not computed")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            metavar="KEY=VALUE",
            help="Set a field of the recipe or of LoRA, such as -o size=8. Can be given several times.",
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Plan the training runs of the DiffuGPT and DiffuLLaMA paper instead of MODEL."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, time and cost of a training run before it is started.

    Prints parameters, FLOPs, memory per device, sharding, hours and cost, and the command that starts the run. The
    operations of one training step are counted without loading weights, for any model family that can be adapted. With
    --answers, also the time and memory of sampling for reinforcement learning.
    """
    with report_errors():
        from diffusify.models.lora import Lora, own_adapters
        from diffusify.planning.devices import DeviceGroup, parse_amount
        from diffusify.planning.plan import plan as run
        from diffusify.planning.reward_plan import RewardPlan, parse_answers, texts_per_pass

        if paper:
            if model or tokens or answers:
                raise ValueError("--paper plans the runs of the paper; leave MODEL, --tokens and --answers out")
            _print_paper_runs(as_json)
            return
        if model is None or (tokens is None) == (answers is None):
            raise ValueError(
                "MODEL and either --tokens or --answers are required, for example: diffusify plan MODEL --tokens 1B "
                "--gpus 8xH100"
            )
        sampled = parse_answers(answers) if answers else None
        token_count = sampled[0] * length if sampled else parse_amount(tokens or "")
        devices = DeviceGroup.parse(gpus)
        base, _ = own_adapters(model) or (model, None)
        make_recipe = recipe_function(recipe or default_recipe_name(base))
        lora_types = argument_types(Lora, "alpha", "embeddings") if lora is not None else {}
        recipe_options, lora_options = parse_options(option or [], argument_types(make_recipe), lora_types)
        with console.status("counting the operations of a step"):
            found = run(
                model,
                tokens=token_count,
                gpus=devices,
                recipe=make_recipe(**recipe_options) if recipe or recipe_options else None,
                length=length,
                batch=texts_per_pass(sampled[1], batch) if sampled else batch,
                lora=None if lora is None else Lora(lora, **lora_options),
                dtype=dtype,
                utilisation=utilisation,
                price=price,
            )
        rewarded = RewardPlan(found, *sampled) if sampled else None
        if as_json:
            print(json.dumps((rewarded or found).to_dict()))
            return
        _print_plan(found, rewarded)
        if found.layout is not None:
            suggest(_reward_command(rewarded) if rewarded else _training_command(found, recipe, option or []))
            return
        command = [f"diffusify plan {shlex.quote(model)}", f"--answers {answers}" if answers else f"--tokens {tokens}"]
        command += [f"--recipe {recipe.value}"] if recipe else []
        command += [f"-o {shlex.quote(pair)}" for pair in option or []]
        given = {"--gpus": gpus, "--length": length, "--batch": batch, "--lora": lora, "--dtype": dtype}
        given |= {"--utilisation": utilisation, "--price": price}
        for suggestion in found.suggestions[:1]:
            name, _, value = suggestion.option.partition(" ")
            changed = {key: v for key, v in (given | {name: value}).items() if v is not None}
            suggest(" ".join([*command, *(f"{key} {value}" for key, value in changed.items())]))


def _training_command(found: "Plan", recipe: RecipeName | None, pairs: list[str]) -> str:
    """The command that starts the planned run, with the placeholder DATA."""
    count, setup = found.devices.count, found.setup
    program = "diffusify"
    if count > 1:
        per_node = max(size for size in range(1, 9) if count % size == 0)
        nodes = f" --nnodes {count // per_node}" if count > per_node else ""
        program = f"torchrun --nproc-per-node {per_node}{nodes} -m diffusify"
    settings = [f"length={setup.length}", f"per_device_train_batch_size={found.rows}", *_dtype_setting(found)]
    settings += ["activation_checkpointing=true"] if found.checkpointing else []
    settings += {"ZeRO-2": ["fsdp=shard_grad_op"], "ZeRO-3": ["fsdp=full_shard"]}.get(found.sharding, [])
    words = ["adapt", shlex.quote(found.model), "--data DATA"]
    words += [f"--recipe {recipe.value}"] if recipe else []
    words += _lora_option(found)
    words += [f"--steps {found.steps}", *(f"-o {shlex.quote(pair)}" for pair in [*pairs, *settings])]
    return " ".join([program, *words])


def _lora_option(found: "Plan") -> list[str]:
    """The option for new adapters; a model that has some continues with them."""
    from diffusify.models.lora import own_adapters

    lora = found.setup.lora
    return [] if lora is None or own_adapters(found.model) else [f"--lora {lora.rank}"]


def _dtype_setting(found: "Plan") -> list[str]:
    """The training option for the data type to compute in, unless the run takes it by itself."""
    from diffusify.training.run_folder import fast_bfloat16

    device, dtype = found.devices.device, found.setup.dtype
    bfloat16 = fast_bfloat16() if device.name == "cpu" else device.dtype == "bfloat16"
    settings = {"bfloat16": "bf16=true", "float16": "fp16=true", "float32": "bf16=false"}
    return [] if dtype == ("bfloat16" if bfloat16 else "float32") else [settings[dtype]]


def _reward_command(found: "RewardPlan") -> str:
    """The command that starts the planned run with the default numbers of prompts and answers in a step."""
    from diffusify.planning.reward_plan import GROUP, PROMPTS, texts_per_pass

    learning, texts = found.learning, PROMPTS * GROUP
    words = [f"diffusify reinforce {shlex.quote(learning.model)} --data DATA --reward REWARD"]
    words += [f"--max-new-tokens {found.new_tokens} --steps {max(1, round(found.answers / texts))}"]
    words += _lora_option(learning)
    settings = ["activation_checkpointing=true"] if learning.checkpointing else []
    if learning.rows != texts_per_pass(found.new_tokens):
        settings += [f"per_device_train_batch_size={learning.rows}"]
    settings += _dtype_setting(learning)
    return " ".join([*words, *(f"-o {setting}" for setting in settings)])


def _print_plan(found: "Plan", rewarded: "RewardPlan | None" = None) -> None:
    stdout, setup, parameters = Console(highlight=False), found.setup, found.parameters
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    split = f"{short_number(parameters.embeddings)} embeddings, {short_number(parameters.body)} other"
    trained = f"; {short_number(parameters.trained)} trained" if parameters.trained < parameters.total else ""
    facts.add_row("parameters", f"{short_number(parameters.total)} ({split}{trained})")
    run = f"{short_number(found.tokens)} tokens, {setup.recipe.name}, sequence length {setup.length}"
    facts.add_row("FLOPs", f"{found.flops_per_token:.3g} per token, {found.flops:.3g} in total ({run})")
    device, peak = found.devices.device, found.devices.device.peak(setup.dtype) / 1e12
    facts.add_row(
        "devices", f"{found.devices} (peak {peak:,.3g} TFLOP/s in {setup.dtype}, {device.memory:.1f} GiB each)"
    )
    if found.layout is None:
        needed = gib(min(found.memory.total, found.memory_checkpointed.total))
        batch = f"{found.rows} x {setup.length} tokens"
        facts.add_row("fits", f"[red]no[/]: {batch} need {needed} GiB per device")
    else:
        layout = found.sharding + (", activation checkpointing" if found.checkpointing else "")
        facts.add_row("layout", f"{layout}; {found.rows} sequences per device at a time ({found.layout.rows} fit)")
        if rewarded is not None:
            count, peaks = short_number(rewarded.answers), (rewarded.sampling_memory, rewarded.learning_memory)
            sampling, learning = (f", {gib(peak)} GiB" for peak in peaks)
            facts.add_row("sampling", f"{duration(rewarded.sampling_hours)} for {count} answers{sampling}")
            facts.add_row("learning", f"{duration(rewarded.learning_hours)} with a reference model{learning}")
            facts.add_row("time", f"{duration(rewarded.hours)} (at {found.utilisation:.0%} of the peak rate)")
        else:
            rate = f"{found.utilisation:.0%} of the peak rate, {found.tokens_per_second:,.0f} tokens/s"
            facts.add_row("time", f"{duration(found.hours)} for {found.steps:,} steps (at {rate})")
            hours = f"{found.device_hours:,.3g} device hours"
            facts.add_row("cost", hours if found.cost is None else f"{found.cost:,.2f} ({hours} at {found.price:g})")
    stdout.print(facts)
    stdout.print(_memory_table(found.memory, found.memory_checkpointed))
    if found.layout is None:
        stdout.print(
            "Any of these options would make it fit:" if found.suggestions else "No single option makes it fit."
        )
        for suggestion in found.suggestions:
            stdout.print(f"  {suggestion.option:24} {suggestion.what}", markup=False)


def _memory_table(stored: "Memory", checkpointed: "Memory") -> Table:
    """Memory per device with stored activations and with activation checkpointing."""
    table = Table("GiB per device", "stored", "checkpointed", box=None, pad_edge=False, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, label in MEMORY_LABELS.items():
        table.add_row(label, *(gib(getattr(memory, part)) for memory in (stored, checkpointed)))
    table.add_row("total", gib(stored.total), gib(checkpointed.total), style="bold")
    return table


def _print_paper_runs(as_json: bool) -> None:
    """The training runs of the DiffuLLaMA paper as it reports them, and as planned here."""
    from diffusify.planning.paper_runs import RUNS

    with console.status("counting the operations of the paper's runs"):
        plans = [run.plan() for run in RUNS]
    if as_json:
        print(json.dumps([found.to_dict() | {"paper": run.facts()} for run, found in zip(RUNS, plans, strict=True)]))
        return
    reported = Table(
        "", "steps", "batch size", "sequence length", "tokens", "hardware", "layout", box=None, pad_edge=False
    )
    planned = Table(
        "", "parameters", "FLOPs/token", "FLOPs", "hours", "layout", "batch per device", "GiB", box=None, pad_edge=False
    )
    for run, found in zip(RUNS, plans, strict=True):
        reported.add_row(
            run.name, f"{run.steps:,}", f"{run.batch:,}", f"{run.length:,}", short_number(run.tokens), run.hardware,
            run.layout,
        )  # fmt: skip
        memory = found.memory_checkpointed if found.checkpointing else found.memory
        planned.add_row(
            run.name, short_number(found.parameters.total), f"{found.flops_per_token:.3g}", f"{found.flops:.3g}",
            f"{found.hours:,.0f}", found.sharding + (", checkpointed" if found.checkpointing else ""),
            f"{found.rows} of {run.rows}", gib(memory.total),
        )  # fmt: skip
    stdout = Console(highlight=False)
    stdout.print("[bold]As reported in the paper[/] (arXiv 2410.17891, which does not report hours)", reported, "")
    stdout.print("[bold]As planned[/] (batch per device: what fits at a time, of the paper's)", planned)
    suggest("diffusify plan gpt2 --recipe ar --tokens 131B --length 512 --gpus 8xA100-80GB")


def short_number(number: int | float) -> str:
    """A number with three significant digits and a unit, such as 65B or 124M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def gib(size: float) -> str:
    """A number of bytes in GiB."""
    return f"{size / 2**30:,.2f}"


def duration(hours: float) -> str:
    """A time in minutes, hours or days."""
    if hours < 1:
        return f"{60 * hours:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:,.3g} days"
