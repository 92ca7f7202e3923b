"""A run in a folder: claimed by its settings, trained to its end or to Ctrl-C, found again by the same command."""

import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from diffusify.config import from_plain, nearest, to_plain
from diffusify.models.denoiser import Denoiser
from diffusify.models.lora import Lora
from diffusify.models.recipes import Recipe
from diffusify.models.saving import sync
from diffusify.training.budget import Budget
from diffusify.training.metrics_log import MetricsLog
from diffusify.training.progress import TrainingProgress
from diffusify.training.resilience.checkpoints import checkpoints, clear, clear_drafts
from diffusify.training.resilience.distributed import agreed
from diffusify.training.resilience.lock import LOCK, locked
from diffusify.training.trainer import DiffusionTrainer

# How a step's rows are dealt out, which may differ when a run goes on: their number may not.
_DEALING = ("per_device_train_batch_size", "gradient_accumulation_steps")


def claim(out: Path, record: dict[str, Any]) -> bool:
    """Whether `out` holds this very run, finished. ValueError when it holds something else, or nothing can be there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the model")
    if out.exists() and any(path.name != LOCK and not path.name.startswith(".saving-") for path in out.iterdir()):
        _check_same(out, record)
        if (out / "diffusion_config.json").is_file():
            clear(out)  # it may have died before it did
            (out / LOCK).unlink(missing_ok=True)
            return True
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{above} cannot be written to; give a folder for the model that can")
    wanted = record["training"].get("report_to", "none")
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in ("none", "all", *get_available_reporting_integrations()):
            raise ValueError(f"report_to={name}: no such package is installed; pip install {name}, or leave it out")
    return False


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
    max_skipped: int = 10,
) -> Path:
    """Train on packed rows, from the last whole checkpoint if there is any; save model, curve and log in `out`.

    `record` has the seed and training options. See `DiffusionTrainer` for how a run ends before its time; OSError
    where its model cannot be saved.
    """
    args = training_arguments(out, budget, denoiser, record["seed"], record["training"])
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens_per_step = rows_per_step * length
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if args.should_save else nullcontext():  # the first process holds the folder
        if args.should_save:
            clear_drafts(out)
            _check_rows(out, rows_per_step, args.world_size)
            _write(out / "run.json", record | {"rows_per_step": rows_per_step}, indent=2)
        progress = TrainingProgress(budget, tokens_per_step, console)
        trainer = DiffusionTrainer(
            denoiser,
            recipe,
            args,
            train_dataset=rows,
            eval_dataset=held_out,
            tokenizer=tokenizer,
            callbacks=[MetricsLog(out, tokens_per_step), progress],
            budget=budget,
            max_skipped=max_skipped,
            tell=lambda line: console.print(line, markup=False, soft_wrap=True),
        )
        [resumes] = agreed(bool(checkpoints(out)))
        try:
            trainer.train(resume_from_checkpoint=bool(resumes))
        finally:
            progress.bar.stop()
            if trainer.stream is not None and trainer.stream.tally.corrupt:
                console.print(f"left out: {trainer.stream.tally}", soft_wrap=True)
        try:
            if args.should_save:
                log = {"tokens_per_step": tokens_per_step, "log": trainer.state.log_history}
                _write(out / "training.json", log, indent=1)
            trainer.save_model(str(out))
        except Exception as error:
            raise OSError(
                f"the model could not be saved in {out} ({error!r}); {trainer.last}; make room, then try again"
            ) from error
        if args.should_save:
            clear(out)
    return out


def _check_same(out: Path, record: dict[str, Any]) -> None:
    """ValueError unless `out` holds the run that the record tells of."""
    there = out / "run.json"
    if not there.is_file():
        raise ValueError(f"{out} holds other files; give an empty or new folder")
    before, here = json.loads(there.read_text(encoding="utf-8")), json.loads(json.dumps(record))
    for name, kind in (("recipe", Recipe), ("lora", Lora)):
        if before.get(name) not in (None, here.get(name)):  # an earlier version wrote no fields that it did not have
            with suppress(ValueError):  # a choice of one's own does not read
                before[name] = to_plain(from_plain(before[name], kind, name))
    for run in (before, here):
        run["training"] = {name: value for name, value in run.get("training", {}).items() if name not in _DEALING}
    differing = [name for name in here if before.get(name) != here[name]]
    if differing:
        what = ", ".join(f"{name} {before.get(name)} there, {here[name]} here" for name in differing)
        raise ValueError(f"{out} holds another run ({what}); give another folder, or remove it")


def _check_rows(out: Path, rows: int, processes: int) -> None:
    """ValueError if the run in `out` was begun with another number of rows in a step."""
    there = out / "run.json"
    begun = json.loads(there.read_text(encoding="utf-8")).get("rows_per_step", rows) if there.is_file() else rows
    if begun != rows:
        raise ValueError(
            f"the run in {out} was begun with {begun} rows in a step, and here are {rows}; "
            f"set {' and '.join(_DEALING)} so that {processes} processes have {begun} together"
        )


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
        "ddp_find_unused_parameters": False,
    }
    settings = defaults | {"output_dir": str(out), "max_steps": budget.max_steps, "seed": seed} | options
    return TrainingArguments(**settings)


def fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mps.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)


def _write(path: Path, value: dict[str, Any], *, indent: int) -> None:
    """JSON that is there in full or not at all."""
    draft = path.with_name(f".saving-{path.name}")
    draft.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    sync(draft, deep=False)
    os.replace(draft, path)
