"""Training in a run folder, which the same command resumes, or recognizes as finished."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from diffusify.config import DocumentFrame, from_plain, nearest, to_current, to_plain
from diffusify.models.denoiser import Denoiser
from diffusify.models.lora import Lora
from diffusify.models.recipe import Recipe
from diffusify.models.saving import fsync_path
from diffusify.text.stream import RowStream
from diffusify.training.budget import Budget
from diffusify.training.metrics_log import Draw, MetricsLog
from diffusify.training.progress import TrainingProgress
from diffusify.training.resilience.checkpoints import list_checkpoints, remove_checkpoints, remove_partial_saves
from diffusify.training.resilience.distributed import all_reduce_max
from diffusify.training.resilience.lock import LOCK, locked
from diffusify.training.trainer import DiffusionTrainer
from diffusify.training.unsupported_options import UNSUPPORTED, check_supported, check_supported_by_streams

# How a step's rows are split into micro-batches. A resumed run may change the split, but not the rows per step.
_BATCH_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")


def check_run_folder(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds the run with these settings, finished.

    Raises ValueError if it holds anything else but this run, if it cannot be written, or if the settings ask for a
    reporter (`report_to`) that is not installed.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the model")
    if out.exists() and any(path.name != LOCK and not path.name.startswith(".saving-") for path in out.iterdir()):
        _check_same_settings(out, settings)
        if (out / "diffusion_config.json").is_file():
            remove_checkpoints(out)  # the run may have been killed before it removed them
            (out / LOCK).unlink(missing_ok=True)
            return True
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} cannot be written to; give a folder for the model that can")
    reporters = settings["training"].get("report_to", "none")
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name not in ("none", "all", *get_available_reporting_integrations()):
            raise ValueError(f"report_to={name}: this package is not installed; pip install {name}, or leave it out")
    return False


def read_frame(out: Path) -> DocumentFrame | None:
    """The frame of documents that the run in `out` began with; None if there is no run."""
    path = out / "run.json"
    if not path.is_file():
        return None
    run = json.loads(path.read_text(encoding="utf-8"))
    return from_plain(run.get("frame", {}), DocumentFrame, "frame")  # earlier versions used the tokenizer's own


def train(
    out: Path,
    settings: dict[str, Any],
    denoiser: Denoiser,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: Any,
    held_out: Any,
    length: int,
    budget: Budget,
    console: Console,
    max_skipped: int = 10,
    make_trainer: Callable[..., DiffusionTrainer] = DiffusionTrainer,
    make_progress: Callable[..., TrainingProgress] = TrainingProgress,
    draw: Draw | None = None,
) -> Path:
    """Train on packed rows, from the newest valid checkpoint if there is one; save model, curve and log in `out`.

    `settings` are what `run.json` stores; they include the seed and the training options. Another kind of training has
    its own trainer, with rows of its own, its own progress and its own curve. See `ResilientTrainer` for what ends a
    run early. Raises OSError if the model cannot be saved.
    """
    if isinstance(rows, RowStream):
        check_supported_by_streams(settings["training"])
    if not settings["training"].keys().isdisjoint(("eval_strategy", "eval_steps")):
        budget.evaluations = 0
    if not settings["training"].keys().isdisjoint(("save_strategy", "save_steps")):
        budget.save_minutes = inf
    args = training_arguments(out, budget, denoiser, settings["seed"], settings["training"])
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens_per_step = rows_per_step * length
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if args.should_save else nullcontext():  # the main process holds the lock
        if args.should_save:
            remove_partial_saves(out)
            _check_rows_per_step(out, rows_per_step, args.world_size)
            run = settings | {"rows_per_step": rows_per_step, "frame": to_plain(denoiser.diffusion_config.frame)}
            _write_json(out / "run.json", run, indent=2)
        progress = make_progress(budget, tokens_per_step, console)
        trainer = make_trainer(
            denoiser,
            recipe,
            args,
            train_dataset=rows,
            eval_dataset=held_out,
            tokenizer=tokenizer,
            callbacks=[MetricsLog(out, tokens_per_step, draw), progress],
            budget=budget,
            max_skipped=max_skipped,
            notify=lambda line: console.print(line, markup=False, soft_wrap=True),
        )
        if args.should_save:
            console.print(_describe_run(denoiser, recipe, args), soft_wrap=True)
        [has_checkpoint] = all_reduce_max(bool(list_checkpoints(out)))
        try:
            trainer.train(resume_from_checkpoint=bool(has_checkpoint))
        finally:
            progress.bar.stop()
            if trainer.stream is not None and trainer.stream.bad_records.corrupt:
                console.print(f"skipped: {trainer.stream.bad_records}", soft_wrap=True)
        try:
            if args.should_save:
                log = {"tokens_per_step": tokens_per_step, "log": trainer.state.log_history}
                _write_json(out / "training.json", log, indent=1)
            trainer.save_model(str(out))
        except Exception as error:
            raise OSError(
                f"the model could not be saved in {out} ({error!r}); {trainer.checkpoint_status}; free some disk "
                "space, then run the same command again"
            ) from error
        if args.should_save:
            remove_checkpoints(out)
    return out


def _check_same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError unless the `run.json` in `out` has these settings. How rows are split may differ."""
    path = out / "run.json"
    if not path.is_file():
        raise ValueError(f"{out} holds other files; give an empty or new folder")
    saved, given = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    for name, kind in (("recipe", Recipe), ("lora", Lora)):
        if name in saved:  # an earlier version has fewer fields, or other names; a user's own class cannot be read
            saved[name] = to_current(saved[name], kind)
    for run in (saved, given):
        no_effect = (*_BATCH_SPLIT, *UNSUPPORTED)  # earlier versions accepted options that had none
        run["training"] = {name: value for name, value in run.get("training", {}).items() if name not in no_effect}
    before, now = (run.pop("data_checksum", None) for run in (saved, given))
    differing = [name for name in given if saved.get(name) != given[name]]
    if differing:
        what = ", ".join(f"{name} was {saved.get(name)} and now is {given[name]}" for name in differing)
        raise ValueError(f"{out} holds another run ({what}); give another folder, or remove it")
    if None not in (before, now) and before != now:  # earlier versions saved none, and hubs have none
        raise ValueError(
            f"{out} holds a run on other data: the files of {given['data']} have changed since it began; put the "
            "earlier files back, or give another folder to train on the new ones"
        )


def _check_rows_per_step(out: Path, rows: int, processes: int) -> None:
    """Raise ValueError if the run in `out` was started with another number of rows per step."""
    path = out / "run.json"
    started = json.loads(path.read_text(encoding="utf-8")).get("rows_per_step", rows) if path.is_file() else rows
    if started != rows:
        raise ValueError(
            f"the run in {out} was started with {started} rows per step, but the settings now give {rows}; "
            f"set {' and '.join(_BATCH_SPLIT)} so that {processes} processes have {started} in total"
        )


def check_training_options(
    options: dict[str, Any], *, minutes: float | None = None, held_out: int | None = None
) -> dict[str, Any]:
    """Training options with plain values converted to their field's type, for a run of some `minutes` if given.

    With a `held_out` of 0 nothing is evaluated. Raises ValueError for a name that is not a field of
    `TrainingArguments`, for an option that would have no effect, and for a value of the wrong type.
    """
    if held_out is not None and held_out < 0:
        raise ValueError(f"held_out={held_out} must be at least 0; with 0 there is no validation")
    if held_out == 0:
        for name, value in options.items():
            if name.startswith("eval_") and (name, value) != ("eval_strategy", "no"):
                raise ValueError(f"held_out=0 leaves nothing to evaluate on; leave {name}={value} out")
        options = {"eval_strategy": "no"} | options
    hints = get_type_hints(TrainingArguments)
    for name in options:
        if name not in hints:
            raise ValueError(
                f'"{name}" is not a field of TrainingArguments{nearest(name, hints.keys() - UNSUPPORTED.keys())}'
            )
    check_supported(options, minutes=minutes)
    simple = bool | int | float | str
    return {k: from_plain(v, hints[k], k) if isinstance(v, simple) else v for k, v in options.items()}


def training_arguments(
    out: Path, budget: Budget, denoiser: Denoiser, seed: int, options: dict[str, Any]
) -> TrainingArguments:
    """`TrainingArguments` with defaults for short runs of small models, overridden by the user's `options`."""
    parameters = sum(weight.numel() for weight in denoiser.parameters())
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": _learning_rate(parameters, denoiser.diffusion_config.adapters == "masks"),
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "bf16": fast_bfloat16() and not options.get("fp16"),
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": 5,
        "save_strategy": "no",
        "save_total_limit": 2,
        "eval_on_start": options.get("eval_strategy") != "no" and not options.get("eval_delay"),
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }
    fixed = {"output_dir": str(out), "max_steps": budget.max_steps, "seed": seed}
    implied: dict[str, Any] = {f"{kind}_strategy": "steps" for kind in ("save", "eval") if f"{kind}_steps" in options}
    return TrainingArguments(**(defaults | fixed | implied | options))


def _describe_run(denoiser: Denoiser, recipe: Recipe, args: TrainingArguments) -> str:
    """One line about what is trained and where: `recipe mlm: trains all 134,515,008 weights on cpu in bfloat16`."""
    weights = sum(weight.numel() for weight in denoiser.parameters())
    trained = sum(weight.numel() for weight in denoiser.parameters() if weight.requires_grad)
    share = "all" if trained == weights else f"{trained:,} of"
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return f"recipe {recipe.name}: trains {share} {weights:,} weights on {args.device} in {dtype}"


def _learning_rate(parameters: int, masks_only: bool) -> float:
    """The default for a number of parameters; adapters that act on masks only begin without any effect."""
    if masks_only:
        return 3e-3 if parameters < 1e9 else 1e-3
    return 3e-4 if parameters < 4e8 else 1e-4 if parameters < 1e9 else 2e-5


def fast_bfloat16() -> bool:
    """Whether this machine's accelerator or CPU is faster in bfloat16 than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mps.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)


def _write_json(path: Path, value: dict[str, Any], *, indent: int) -> None:
    """Write a JSON file atomically."""
    partial = path.with_name(f".saving-{path.name}")
    partial.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    fsync_path(partial, recursive=False)
    os.replace(partial, path)
