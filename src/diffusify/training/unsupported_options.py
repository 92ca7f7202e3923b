"""The fields of `transformers.TrainingArguments` that runs do not follow, and what to use instead."""

from typing import Any

_LENGTH = "set the length of the run: steps or minutes (--steps, --minutes)"
_LOSS_ONLY = "held-out rows are always measured by the NELBO alone; leave it out"
_CHECKPOINTS = "checkpoints are for resuming and hold all that this needs; leave it out"
_BEST = "the last weights are kept, and curve.png shows the NELBO of every evaluation; leave it out"
_HUB = "upload the finished folder: diffusify push"
_COMPILE = "torch_compile=true compiles each layer with PyTorch's defaults; leave it out"
_ROWS = "the rows of a step are distributed here, by per_device_train_batch_size and gradient_accumulation_steps"
_PACKED = "packed rows have one length and fixed columns; leave it out"
_DENOISER = "it changes networks in a way that denoisers do not support; leave it out"
_COMMAND = "the command decides what is run; leave it out"

UNSUPPORTED = {
    "output_dir": "give the folder as out (--out)",
    "num_train_epochs": "use epochs (--epochs) of tune, or " + _LENGTH,
    "max_steps": _LENGTH,
    "seed": "give the seed as an option of adapt or tune",
    "label_smoothing_factor": "use label_smoothing of the recipe mlm",
    "average_tokens_across_devices": "the loss is always averaged over all processes; leave it out",
    "bf16_full_eval": "evaluation runs in the same precision as training (bf16); leave it out",
    "fp16_full_eval": "evaluation runs in the same precision as training (fp16); leave it out",
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _DENOISER,
    "liger_kernel_config": _DENOISER,
    "use_cache": "training never uses a KV cache; leave it out",
    "neftune_noise_alpha": _DENOISER,
    "auto_find_batch_size": "lower per_device_train_batch_size and raise gradient_accumulation_steps to save memory",
    "logging_nan_inf_filter": "non-finite steps are skipped and reported (max_skipped); leave it out",
    "include_num_input_tokens_seen": "the log has the tokens of every step; leave it out",
    "prediction_loss_only": _LOSS_ONLY,
    "eval_do_concat_batches": _LOSS_ONLY,
    "eval_use_gather_object": _LOSS_ONLY,
    "eval_accumulation_steps": _LOSS_ONLY,
    "include_for_metrics": _LOSS_ONLY,
    "batch_eval_metrics": _LOSS_ONLY,
    "save_only_model": _CHECKPOINTS,
    "restore_callback_states_from_checkpoint": _CHECKPOINTS,
    "enable_jit_checkpoint": "a run that is stopped saves a checkpoint anyway; leave it out",
    "ignore_data_skip": "a resumed run always goes on where it was; leave it out",
    "resume_from_checkpoint": "the same command resumes a run; leave it out",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "accelerator_config": _ROWS,
    "parallelism_config": _ROWS,
    "dataloader_drop_last": "every step has all its rows, which go on into the next epoch; leave it out",
    "remove_unused_columns": _PACKED,
    "label_names": _PACKED,
    "length_column_name": _PACKED,
    "do_train": _COMMAND,
    "do_eval": _COMMAND,
    "do_predict": _COMMAND,
    "local_rank": "torchrun and accelerate launch set it; leave it out",
}

# Values that are not followed, of fields that are.
_UNSUPPORTED_VALUES = {
    ("save_strategy", "best"): _BEST,
    ("lr_scheduler_type", "reduce_lr_on_plateau"): "use a schedule over steps, such as cosine",
    ("train_sampling_strategy", "group_by_length"): _PACKED,
}

# Fields that have an effect only together with another.
_NEEDED = {
    "run_name": "report_to",
    "project": "report_to",
    "trackio_space_id": "report_to",
    "trackio_bucket_id": "report_to",
    "trackio_static_space_id": "report_to",
    "optim_args": "optim",
    "optim_target_modules": "optim",
    "lr_scheduler_kwargs": "lr_scheduler_type",
    "eval_delay": "eval_strategy",
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
}

# Fields without an effect on data that is streamed.
_NOT_STREAMED = (
    "data_seed", "train_sampling_strategy", "dataloader_persistent_workers", "dataloader_in_order",
)  # fmt: skip


def check_supported(options: dict[str, Any], *, minutes: float | None) -> None:
    """Raise ValueError for a training option that would not have its effect, with what to use instead."""
    for name, value in options.items():
        advice = UNSUPPORTED.get(name) or _UNSUPPORTED_VALUES.get((name, str(getattr(value, "value", value))))
        if advice:
            raise ValueError(f"{name}={value} of TrainingArguments cannot be set here: {advice}")
        if name in _NEEDED and _NEEDED[name] not in options:
            raise ValueError(f"{name}={value} has no effect without {_NEEDED[name]}; give both, or leave it out")
        if minutes is not None and name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
            raise ValueError(
                f"{name}={value} needs a number of steps; with minutes={minutes} the learning rate falls linearly over "
                "time"
            )
    for kind in ("save", "eval", "logging"):
        steps, strategy = options.get(f"{kind}_steps"), options.get(f"{kind}_strategy", "steps")
        if steps is not None and strategy not in ("steps", "no"):  # "no" turns them off
            raise ValueError(f"{kind}_steps={steps} has no effect with {kind}_strategy={strategy}; leave out one")


def check_supported_by_streams(options: dict[str, Any]) -> None:
    """Raise ValueError for a training option that has no effect on data that is streamed."""
    for name in _NOT_STREAMED:
        if name in options:
            raise ValueError(
                f"{name}={options[name]} has no effect on data that is streamed; leave it out, or set streaming=false"
            )
