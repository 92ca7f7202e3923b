"""Finetuning: pairs or chats teach a diffusion model, or a base on its way to one, what to answer."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from diffusify.config import sees_right_context, to_plain
from diffusify.models.attention_check import check_attention
from diffusify.models.lora import Lora, check_lora
from diffusify.models.recipes import Recipe, of_model
from diffusify.models.saving import checksum, open_base
from diffusify.text.examples import Template, make_examples
from diffusify.text.packing import pack_examples
from diffusify.text.sources import load_records
from diffusify.training.adapt import make_denoiser
from diffusify.training.budget import Budget
from diffusify.training.run_folder import check_training_options, claim, train, training_arguments
from diffusify.training.self_generated import OWN, check_writer, with_own_answers


def tune(
    model: str,
    data: str,
    out: Path | str,
    *,
    template: Template | None = None,
    recipe: Recipe | None = None,
    lora: Lora | None = None,
    length_head: bool = False,
    epochs: float = 1.0,
    steps: int | None = None,
    minutes: float | None = None,
    length: int | None = None,
    held_out: int = 100,
    seed: int = 0,
    max_skipped: int = 10,
    console: Console | None = None,
    **training: Any,
) -> Path:
    """Finetune on prompts and what should be written after them; save the model in `out`.

    `model` is a folder that `adapt` or `tune` made, which goes on as its card says (where it holds adapters, these are
    trained on), or a base with the `recipe` that makes it a diffusion model (Diffusion-LLM's task finetuning). `data`
    as `load_records` takes it, and `self:DATA` are answers that the model writes itself to DATA's questions (see
    `with_own_answers`); the `template` says what of a record is prompt and target, else its fields do. Only
    targets are noised and learnt, their end token included. `lora` trains new adapters instead of all weights. The
    `length_head` learns to tell a target's length from its prompt. The budget is `steps` or `minutes`, else `epochs`.
    Examples of more than `length` tokens (512, or what the model can see) are left out; `held_out` prompts are kept
    aside to measure the bound. ValueError for anything that cannot work.
    """
    out, console = Path(out), console or Console(stderr=True, highlight=False)
    training = check_training_options(training)
    recipe = _recipe(model, recipe)
    check_lora(model, lora)
    if template is not None and OWN.search(data):
        raise ValueError(f"data {data}: what a model answers itself are chats, which need no template; leave it out")
    if length_head and not sees_right_context(recipe.attention):
        raise ValueError(f"{recipe.attention} writes from left to right and learns where to end; leave the length head")
    record = {
        "model": model,
        "data": data,
        "template": to_plain(template),
        "recipe": to_plain(recipe),
        "lora": to_plain(lora),
        "length_head": length_head,
        "budget": {"epochs": epochs, "steps": steps, "minutes": minutes},
        "length": length,
        "held_out": held_out,
        "seed": seed,
        "training": training,
    }
    if claim(out, record):
        console.print(f"{out} holds this run already, finished")
        return out
    records = load_records(OWN.sub(r"\1", data), seed=seed)  # refuses what is not there
    base = open_base(model)
    check_writer(data, model, masked=base.masked)
    weights = checksum(base.network)
    torch.manual_seed(seed)  # new weights, the same on every rank and after a resume
    denoiser, tokenizer = make_denoiser(base, recipe, lora=lora)
    length = min(512, denoiser.context or 512) if length is None else length
    if denoiser.context is not None and length > denoiser.context:
        raise ValueError(f"length={length} is more than the {denoiser.context} tokens that {model} can see; use less")
    check_attention(denoiser)
    if OWN.search(data):
        written = with_own_answers(data, model, weights, base.network, tokenizer, length, seed, console)
        records = load_records(written, seed=seed)
    examples, left_out = make_examples(
        records, tokenizer, template=template, each_turn=not sees_right_context(recipe.attention), length=length
    )
    if left_out:
        console.print(f"{left_out:,} of {left_out + len(examples):,} examples have more than {length} tokens: left out")
    if length_head:
        denoiser.add_length_head(max(sum(target) for target in examples["target"]))
    examples, held = split_off_prompts(examples, held_out, seed=seed)
    rows, held = (pack_examples(part, length, pad_token_id=tokenizer.pad_token_id) for part in (examples, held))
    if steps is None and minutes is None:
        args = training_arguments(out, Budget(1), denoiser, seed, training)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = max(1, round(epochs * len(rows) / batch))
    return train(
        out, record, denoiser, recipe, base.tokenizer,
        rows=rows, held_out=held, length=length, budget=Budget(steps, minutes), console=console,
        max_skipped=max_skipped,
    )  # fmt: skip


def split_off_prompts(examples: Dataset, count: int, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The examples without those of `count` prompts (at most a tenth of all), and those; no prompt is in both.

    ValueError if there are too few prompts to hold any out.
    """
    prompts = [
        tuple(token for token, written in zip(tokens, target, strict=True) if not written)
        for tokens, target in zip(examples["tokens"], examples["target"], strict=True)
    ]
    kinds = list(dict.fromkeys(prompts))
    if len(kinds) < 2:
        raise ValueError("all examples have the same prompt, so none can be held out to measure on; give more data")
    random.Random(seed).shuffle(kinds)
    held = set(kinds[: max(1, min(count, len(kinds) // 10))])
    where = [prompt in held for prompt in prompts]
    return (
        examples.select([i for i, is_held in enumerate(where) if not is_held]),
        examples.select([i for i, is_held in enumerate(where) if is_held]),
    )


def _recipe(model: str, recipe: Recipe | None) -> Recipe:
    """The recipe to go on with. ValueError when it is given twice or not at all."""
    own = of_model(model)
    if own and recipe:
        raise ValueError(f"{model} is a diffusion model already and goes on as its card says; leave --recipe out")
    if found := own or recipe:
        return found
    raise ValueError(
        f"{model} is no diffusion model yet; say how it becomes one with --recipe (mlm for a masked model, "
        "block or ar for a left-to-right one), or run `diffusify adapt` first"
    )
