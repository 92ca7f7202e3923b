"""Finetuning on pairs of prompt and target, or on chats."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from diffusify.config import sees_right_context, to_plain
from diffusify.models.attention_check import check_attention
from diffusify.models.bundled import find_diffusion_config
from diffusify.models.document_frame import choose_frame
from diffusify.models.loading import is_masked_lm
from diffusify.models.lora import Lora, check_lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.quantization import check_load_in_4bit
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import default_recipe, saved_recipe
from diffusify.models.saving import checksum, open_base
from diffusify.text.examples import Template, make_examples
from diffusify.text.packing import pack_examples
from diffusify.text.sources import load_records, other_files, source_checksum
from diffusify.training.adapt import known_frame
from diffusify.training.budget import Budget
from diffusify.training.run_folder import check_run_folder, check_training_options, train, training_arguments
from diffusify.training.self_generated import SELF_SOURCE, check_can_generate, with_generated_answers


def tune(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    template: Template | None = None,
    recipe: Recipe | None = None,
    lora: Lora | None = None,
    load_in_4bit: bool = False,
    length_head: bool = False,
    epochs: float = 1.0,
    steps: int | None = None,
    minutes: float | None = None,
    length: int | None = None,
    start_token: str | None = None,
    end_token: str | None = None,
    mask_token_id: int | None = None,
    held_out: int = 100,
    seed: int = 0,
    max_skipped: int = 10,
    max_corrupt: float = 0.01,
    console: Console | None = None,
    **training: Any,
) -> Path:
    """Finetune a model on prompts and targets, and save it in `out`.

    - `model`: a folder that `adapt` or `tune` made, which continues with its own recipe and adapters; or a base, which
      the `recipe` makes a diffusion model (Diffusion-LLM's task finetuning); default: that of `default_recipe`.
    - `data`: records as `load_records` takes them. `self:DATA` are answers that the model generates itself to DATA's
      questions (see `with_generated_answers`).
    - `template`: the prompt and the target of a record; default: its well-known fields (see `make_examples`). Only
      targets, their end token included, are noised and learned.
    - `lora` trains new adapters instead of all weights, and `load_in_4bit` on a base with 4-bit weights (QLoRA).
    - `length_head` also trains a head that predicts a target's length from its prompt; one that the model has is
      trained further in any case.
    - `steps` or `minutes` is the budget; default: `epochs`.
    - `length`: longer examples are skipped; default: 512 tokens, or the model's context if that is shorter.
    - `held_out` prompts are held out to measure the NELBO; 0 trains on all and measures nothing.
    - Records that cannot be used are skipped and reported, up to a share `max_corrupt` of them.

    `start_token` and `end_token` frame pairs with a template; chats are framed by the chat template. Other arguments,
    resuming and errors are as in `adapt`. Raises ValueError for bad arguments.
    """
    model, data, out, console = str(model), str(data), Path(out), console or Console(stderr=True, highlight=False)
    training = check_training_options(training, minutes=minutes, held_out=held_out)
    recipe = _choose_recipe(model, recipe)
    if recipe.adapters == "masks" and not SELF_SOURCE.search(data):
        config = find_diffusion_config(model)
        raise ValueError(
            f"the adapters of {recipe.name} leave the AR half as it is, so it cannot learn the answers in {data}; "
            f"finetune {config.base_model if config else model} with the recipe block, or let the model answer the "
            f"questions itself: --data self:{data}"
        )
    check_lora(model, lora, recipe)
    if load_in_4bit:
        check_load_in_4bit(model, lora, recipe)
    if template is not None and SELF_SOURCE.search(data):
        raise ValueError(f"data {data}: answers that a model generates are chats, which need no template; leave it out")
    if length_head and not sees_right_context(recipe.attention):
        raise ValueError(
            f"{recipe.attention} decodes from left to right and learns where to end, so it needs no length head; "
            "leave the length head out"
        )
    if length_head and recipe.length_noise:
        raise ValueError(
            f"{model} finds the length of masked spans itself, with length tokens that change the lengths that a "
            "length head learns; leave the length head out"
        )
    settings = {
        "model": model,
        "data": data,
        "data_checksum": source_checksum(SELF_SOURCE.sub(r"\1", data), records=True),
        "template": to_plain(template),
        "recipe": to_plain(recipe),
        "lora": to_plain(lora),
        "load_in_4bit": load_in_4bit or None,  # earlier versions saved nothing
        "length_head": length_head,
        "budget": {"epochs": epochs, "steps": steps, "minutes": minutes},
        "length": length,
        "start_token": start_token,
        "end_token": end_token,
        "held_out": held_out,
        "seed": seed,
        "mask_token_id": mask_token_id,
        "training": training,
    }
    if check_run_folder(out, settings):
        console.print(f"{out} already holds this run, finished")
        return out
    records = load_records(SELF_SOURCE.sub(r"\1", data), seed=seed)  # raises if files are missing
    base = open_base(model, load_in_4bit=load_in_4bit)
    check_can_generate(data, model, masked=base.masked)
    weights = checksum(base.network)
    frame, note = choose_frame(base, known_frame(out, model), start_token=start_token, end_token=end_token)
    if note:
        console.print(note, markup=False, soft_wrap=True)
    torch.manual_seed(seed)  # new weights are the same on every rank and after a resume
    denoiser, tokenizer = make_denoiser(base, recipe, lora=lora, frame=frame, mask_token_id=mask_token_id)
    length = min(512, denoiser.context_length or 512) if length is None else length
    if denoiser.context_length is not None and length > denoiser.context_length:
        raise ValueError(
            f"length={length} is more than the {denoiser.context_length} tokens of {model}'s context; make it smaller"
        )
    check_attention(denoiser)
    if SELF_SOURCE.search(data):
        generated = with_generated_answers(
            data, model, weights, base.network, tokenizer, length, seed, console, max_corrupt
        )
        records = load_records(generated, seed=seed)
    examples = make_examples(
        records,
        tokenizer,
        template=template,
        each_turn=not sees_right_context(recipe.attention),
        length=length,
        max_corrupt=max_corrupt,
    )
    if note := other_files(data, records=True):
        console.print(note, markup=False, soft_wrap=True)
    for note in examples.notes(length):
        console.print(note, markup=False, soft_wrap=True)
    if length_head or denoiser.length_head is not None:
        denoiser.add_length_head(max(sum(target) for target in examples.rows["target"]))
    split = split_off_prompts(examples.rows, held_out, seed=seed)
    rows, held = (
        pack_examples(part, length, pad_token_id=tokenizer.pad_token_id) if len(part) else part for part in split
    )
    if steps is None and minutes is None:
        args = training_arguments(out, Budget(1), denoiser, seed, training)
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = max(1, round(epochs * len(rows) / rows_per_step))
    return train(
        out, settings, denoiser, recipe, base.tokenizer,
        rows=rows, held_out=held, length=length, budget=Budget(steps, minutes), console=console,
        max_skipped=max_skipped,
    )  # fmt: skip


def split_off_prompts(examples: Dataset, count: int, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split examples into (train, held out) by prompt, so that no prompt is in both.

    Holds out `count` prompts, but at most a tenth of all. Raises ValueError if all examples have the same prompt,
    unless `count` is 0.
    """
    if count == 0:
        return examples, examples.select([])
    prompts = [
        tuple(token for token, is_target in zip(tokens, target, strict=True) if not is_target)
        for tokens, target in zip(examples["tokens"], examples["target"], strict=True)
    ]
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        raise ValueError(
            "all examples have the same prompt, so none can be held out for validation; give more data, or train "
            "without validation: held_out=0"
        )
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: max(1, min(count, len(distinct) // 10))])
    is_held = [prompt in held for prompt in prompts]
    return (
        examples.select([i for i, held_out in enumerate(is_held) if not held_out]),
        examples.select([i for i, held_out in enumerate(is_held) if held_out]),
    )


def _choose_recipe(model: str, recipe: Recipe | None) -> Recipe:
    """The recipe of a diffusion model; for a base the given one or the default. Raises ValueError if there are two."""
    own = saved_recipe(model)
    if own and recipe:
        raise ValueError(f"{model} is a diffusion model already and keeps its own recipe; leave --recipe out")
    return own or recipe or default_recipe(masked=is_masked_lm(model))
