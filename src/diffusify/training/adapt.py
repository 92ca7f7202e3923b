"""The whole way: a base, some text and a recipe in; a folder with a diffusion model out."""

import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from diffusify.config import from_plain, nearest, to_plain
from diffusify.models.denoiser import Denoiser
from diffusify.models.influence import check_attention
from diffusify.models.loading import Base, ensure_mask_token, load_base
from diffusify.models.recipes import Recipe, block
from diffusify.models.saving import save_denoiser
from diffusify.text.packing import pack
from diffusify.text.sources import load_texts, split_off
from diffusify.text.tokens import TextTokenizer
from diffusify.training.budget import Budget
from diffusify.training.curve import plot_curve
from diffusify.training.progress import TrainingProgress
from diffusify.training.trainer import DiffusionTrainer


def adapt(
    base: str,
    data: str,
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    length: int = 256,
    held_out: int = 8192,
    seed: int = 0,
    console: Console | None = None,
    **training: Any,
) -> Path:
    """Turn a pretrained language model into a diffusion model and save it in `out`.

    `base` and `data` as `load_base` and `load_texts` take them; rows of `length` tokens; `held_out` tokens are kept
    aside to measure the bound. The budget is `steps` or `minutes` (200 steps when neither is given). `training` are
    fields of `transformers.TrainingArguments`. Progress goes to `console`, standard error if unset. An interrupted
    run goes on where its last checkpoint stands; a finished one is returned as it is. ValueError for anything that
    cannot work, before weights are touched.
    """
    recipe, out, console = recipe or block(), Path(out), console or Console(stderr=True, highlight=False)
    budget = Budget(200 if steps is None and minutes is None else steps, minutes)
    training = check_training_options(training)
    record = {
        "base": base,
        "data": data,
        "recipe": to_plain(recipe),
        "budget": {"steps": budget.steps, "minutes": minutes},
        "length": length,
        "held_out": held_out,
        "seed": seed,
        "training": training,
    }
    if _claim(out, record):
        console.print(f"{out} holds this run already, finished")
        return out
    texts = load_texts(data, seed=seed)
    source = load_base(base)
    denoiser, tokenizer = make_denoiser(source, recipe)
    if denoiser.context is not None and length > denoiser.context:
        raise ValueError(f"length={length} is more than the {denoiser.context} tokens that {base} can see; use less")
    check_attention(denoiser)
    train, valid = split_off(texts, held_out, tokenizer)
    rows = pack(train, tokenizer, length)
    held = pack(valid, tokenizer, length, keep_tail=True)
    assert isinstance(held, Dataset)
    args = training_arguments(out, budget, denoiser, seed, training)
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer = DiffusionTrainer(
        denoiser,
        recipe,
        args,
        train_dataset=rows,
        eval_dataset=held.select(range(min(len(held), max(1, held_out // length)))),
        tokenizer=source.tokenizer,
        callbacks=[TrainingProgress(budget, batch * length, console)],
        budget=budget,
    )
    _run(trainer, out, console)
    if not args.should_save:  # the first process writes
        return out
    curve = {"tokens_per_step": batch * length, "log": trainer.state.log_history}
    (out / "training.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    plot_curve(out)
    save_denoiser(out, denoiser, source.tokenizer)
    for leftover in (*out.glob("checkpoint-*"), out / ".unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)
    return out


def make_denoiser(base: Base, recipe: Recipe) -> tuple[Denoiser, TextTokenizer]:
    """A network under a recipe's card. ValueError when the two do not fit."""
    if base.masked and recipe.shift:
        raise ValueError(
            f"{base.source} is a masked model, which needs no shift: use mlm(), or block(size, masked=True)"
        )
    if not base.masked and recipe.name == "mlm":
        raise ValueError(f"{base.source} is a left-to-right model: use ar() or block(size); mlm() is for masked models")
    mask = ensure_mask_token(base)
    for module in base.network.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    card = recipe.card(type(base.network).__name__, mask, base.source)
    return Denoiser(base.network, card), TextTokenizer(base.tokenizer, mask)


def check_training_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with plain values of the right type. ValueError names what is no field, or no value for it."""
    hints = get_type_hints(TrainingArguments)
    for name in options:
        if name not in hints:
            raise ValueError(f'"{name}" is no field of TrainingArguments{nearest(name, hints)}')
    simple = bool | int | float | str
    return {k: from_plain(v, hints[k], k) if isinstance(v, simple) else v for k, v in options.items()}


def training_arguments(
    out: Path, budget: Budget, denoiser: Denoiser, seed: int, options: dict[str, Any]
) -> TrainingArguments:
    """Defaults for short runs of small models, under whatever the user sets."""
    parameters = sum(weight.numel() for weight in denoiser.parameters())
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 3e-4 if parameters < 4e8 else 1e-4 if parameters < 1e9 else 2e-5,
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "bf16": fast_bfloat16(),
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": 5,
        "save_strategy": "no",
        "save_total_limit": 2,
        "eval_on_start": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    settings = defaults | {"output_dir": str(out), "max_steps": budget.max_steps, "seed": seed} | options
    return TrainingArguments(**settings)


def fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mps.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)


def _claim(out: Path, record: dict[str, Any]) -> bool:
    """Whether `out` holds this very run, finished. ValueError when it holds something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the model")
    there = out / "run.json"
    if not out.exists() or not any(out.iterdir()):
        return False
    if not there.is_file():
        raise ValueError(f"{out} holds other files; give an empty or new folder")
    before = json.loads(there.read_text(encoding="utf-8"))
    differing = [name for name in record if before.get(name) != json.loads(json.dumps(record[name]))]
    if differing:
        what = ", ".join(f"{name} {before.get(name)} there, {record[name]} here" for name in differing)
        raise ValueError(f"{out} holds another run ({what}); give another folder, or remove it")
    return (out / "diffusion_config.json").is_file()


def _run(trainer: DiffusionTrainer, out: Path, console: Console) -> None:
    """Train from the last checkpoint, if any. Ctrl-C saves one, then goes on up."""
    last = get_last_checkpoint(str(out))
    if last:
        console.print(f"going on from {last}")
    try:
        trainer.train(resume_from_checkpoint=last)
    except KeyboardInterrupt:
        trainer._save_checkpoint(trainer.denoiser, None)
        console.print(f"stopped and saved at step {trainer.state.global_step}; the same command goes on from there")
        raise
