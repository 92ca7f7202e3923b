"""Every field of `TrainingArguments` has its effect on a run, or is refused with what to use instead."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from diffusify.models.recipes import block
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget
from diffusify.training.run_folder import check_training_options, training_arguments
from diffusify.training.trainer import DiffusionTrainer
from diffusify.training.unsupported_options import UNSUPPORTED, check_supported_by_streams
from tests.families import tiny_denoiser
from tests.text import makers

# Read by the parts of `transformers.Trainer` that runs here use, or by this package.
SUPPORTED = {
    "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules",
    "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile",
    "torch_empty_cache_steps", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay",
    "per_device_eval_batch_size", "eval_on_start", "save_strategy", "save_steps", "save_on_each_node",
    "save_total_limit", "full_determinism", "data_seed", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataloader_in_order", "train_sampling_strategy", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed",
    "debug", "skip_memory_metrics",
}  # fmt: skip


def test_every_field_is_supported_or_refused() -> None:
    """A new version of transformers may have new fields, which have to be looked at."""
    assert SUPPORTED | set(UNSUPPORTED) == {field.name for field in fields(TrainingArguments)}
    assert SUPPORTED.isdisjoint(UNSUPPORTED)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_fields_without_an_effect_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=5 of TrainingArguments cannot be set here: [a-z]"):
        check_training_options({name: 5})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_train_epochs": 5}, "use epochs"),
        ({"max_steps": 5}, "--steps"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing of the recipe mlm"),
        ({"push_to_hub": True}, "diffusify push"),
        ({"save_strategy": "best"}, "the last weights are kept"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "cosine"),
        ({"run_name": "first"}, "no effect without report_to"),
        ({"save_steps": 5, "save_strategy": "epoch"}, "save_steps=5 has no effect with save_strategy=epoch"),
        ({"num_trainepochs": 5}, "not a field of TrainingArguments(?!.*num_train_epochs)"),
    ],
)
def test_the_right_word_is_named(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_training_options(options)


def test_schedules_need_steps() -> None:
    assert check_training_options({"lr_scheduler_type": "cosine"}) == {"lr_scheduler_type": "cosine"}
    with pytest.raises(ValueError, match=r"needs a number of steps; with minutes=2.0"):
        check_training_options({"lr_scheduler_type": "cosine"}, minutes=2.0)


def test_streams_have_an_order_of_their_own() -> None:
    check_supported_by_streams({"learning_rate": 0.1})
    with pytest.raises(ValueError, match="data_seed=3 has no effect on data that is streamed"):
        check_supported_by_streams({"data_seed": 3})


def test_evaluations_and_checkpoints_can_be_turned_off(causal_base: str, corpus: str, tmp_path: Path) -> None:
    options = {"eval_strategy": "no", "save_strategy": "no", "eval_on_start": False, "bf16": False}
    folder = adapt(causal_base, corpus, tmp_path, steps=2, length=32, held_out=64, logging_steps=1, **options)
    log = json.loads((folder / "training.json").read_text())["log"]
    assert sum("loss" in entry for entry in log) == 2
    assert not any("eval" in name for entry in log for name in entry)


def test_steps_between_saves_and_evaluations_imply_their_strategy(tmp_path: Path) -> None:
    arguments = training_arguments(tmp_path, Budget(9), tiny_denoiser(), 0, {"save_steps": 3, "bf16": False})
    assert (arguments.save_strategy, arguments.save_steps, arguments.eval_strategy) == ("steps", 3, "no")
    arguments = training_arguments(tmp_path, Budget(9), tiny_denoiser(), 0, {"eval_steps": 2, "bf16": False})
    assert (arguments.save_strategy, arguments.eval_steps, arguments.eval_strategy) == ("no", 2, "steps")


@pytest.mark.parametrize(("warmup", "factors"), [(2, [0.5, 0.6, 0.3]), (0.4, [0.0, 0.6, 0.3]), (0, [1.0, 0.6, 0.3])])
def test_warmup_under_minutes_is_steps_or_a_share_of_the_time(
    warmup: float, factors: list[float], tmp_path: Path
) -> None:
    budget = Budget(minutes=1.0)
    options = {"warmup_steps": warmup, "learning_rate": 1.0, "bf16": False, "optim": "sgd"}
    denoiser = tiny_denoiser(vocab_size=320)
    arguments = training_arguments(tmp_path, budget, denoiser, 0, options)
    rows = Dataset.from_dict({"tokens": [[5] * 8], "document": [[1] * 8]})
    trainer = DiffusionTrainer(
        denoiser, block(4), arguments, train_dataset=rows, eval_dataset=rows,
        tokenizer=makers.byte_level().tokenizer, budget=budget,
    )  # fmt: skip
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=1.0)
    scheduler = trainer.create_scheduler(arguments.max_steps, optimizer)
    rates = [scheduler.get_last_lr()[0]]
    for progress in (0.4, 0.7):
        budget.progress = progress
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx(factors)
