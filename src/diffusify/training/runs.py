"""A run in a folder: claimed by its settings, trained to its end or to Ctrl-C, found again by the same command."""

import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from diffusify.config import from_plain, nearest
from diffusify.models.denoiser import Denoiser
from diffusify.models.recipes import Recipe
from diffusify.models.saving import save_denoiser
from diffusify.training.budget import Budget
from diffusify.training.curve import plot_curve
from diffusify.training.progress import TrainingProgress
from diffusify.training.trainer import DiffusionTrainer


def claim(out: Path, record: dict[str, Any]) -> bool:
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


def train(
    out: Path,
    record: dict[str, Any],
    denoiser: Denoiser,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Any,
    held_out: Dataset,
    length: int,
    budget: Budget,
    console: Console,
) -> Path:
    """Train on packed rows, and save model, curve and log in `out`; `record` has the seed and training options."""
    args = training_arguments(out, budget, denoiser, record["seed"], record["training"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    tokens_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * length
    trainer = DiffusionTrainer(
        denoiser,
        recipe,
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        tokenizer=tokenizer,
        callbacks=[TrainingProgress(budget, tokens_per_step, console)],
        budget=budget,
    )
    _train(trainer, out, console)
    if not args.should_save:  # the first process writes
        return out
    curve = {"tokens_per_step": tokens_per_step, "log": trainer.state.log_history}
    (out / "training.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    plot_curve(out)
    save_denoiser(out, denoiser, tokenizer)
    for leftover in (*out.glob("checkpoint-*"), out / ".unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)
    return out


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


def _train(trainer: DiffusionTrainer, out: Path, console: Console) -> None:
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
    finally:
        if trainer.stream is not None and trainer.stream.tally.corrupt:
            console.print(f"left out: {trainer.stream.tally}", soft_wrap=True)
