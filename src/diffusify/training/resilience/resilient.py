"""A `transformers.Trainer` that survives signals, full disks, non-finite steps and corrupt checkpoints."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from diffusify.models.denoiser import Denoiser
from diffusify.models.saving import load_weights, save_denoiser
from diffusify.training.resilience.checkpoints import (
    STAGING,
    commit_checkpoint,
    list_checkpoints,
    remove_partial_saves,
    select_checkpoint,
)
from diffusify.training.resilience.distributed import all_reduce_max
from diffusify.training.resilience.nonfinite import NonFiniteGuard
from diffusify.training.resilience.sharding import (
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state,
)
from diffusify.training.resilience.signals import StopOnSignal


class ResilientTrainer(Trainer):
    """A trainer of denoisers with atomic checkpoints, on any number of processes.

    Checkpoints are verified before use and do not depend on the number of processes that wrote them. If one cannot be
    saved, a message says so and training continues. Non-finite steps are skipped; `max_skipped` in a row end the run.
    SIGINT, SIGTERM and SIGUSR1 end it after the current step, with a checkpoint, as KeyboardInterrupt or SystemExit.
    `notify` is called with messages for the user; default: a logged warning.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        args: TrainingArguments,
        *,
        callbacks: list[TrainerCallback],
        max_skipped: int,
        notify: Callable[[str], None] | None,
        **kwargs: Any,
    ) -> None:
        # The filter would hide non-finite losses from the guard, and synchronize in every micro-batch.
        args.logging_nan_inf_filter = False
        args._n_gpu = min(args.n_gpu, 1)  # on several GPUs without a launcher, Trainer would split canvases over them
        assert args.output_dir is not None, "TrainingArguments always sets it"
        self.denoiser, self.folder = denoiser, Path(args.output_dir)
        self.notify = notify or logging.getLogger(__name__).warning
        self.guard, self.signals = NonFiniteGuard(max_skipped), StopOnSignal(self.notify)
        super().__init__(model=denoiser, args=args, callbacks=[*callbacks, self.guard, self.signals], **kwargs)
        self._last_saved: Path | None = None
        self._save_error: Exception | None = None
        self.guard.can_skip = not self.is_deepspeed_enabled
        if self.is_fsdp_enabled:
            plugin: Any = self.accelerator.state.fsdp_plugin
            if plugin.cpu_ram_efficient_loading:
                raise ValueError("fsdp_cpu_ram_efficient_loading must be false: every process loads the base by itself")
            layers: Any = denoiser.network._no_split_modules
            denoiser._no_split_modules = layers  # accelerate reads it from the outer module

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, optionally from a checkpoint: a folder, or True for the newest valid one.

        Raises ValueError if that checkpoint is corrupt or none is valid, and FloatingPointError after `max_skipped`
        non-finite steps in a row.
        """
        checkpoint = None
        if resume_from_checkpoint:
            is_main = self.args.should_save
            checkpoint = str(select_checkpoint(self.folder, resume_from_checkpoint, self.notify, is_main=is_main))
            self.args.eval_on_start = False  # the resumed log already has it
            if self.is_fsdp_enabled:
                load_weights(self.denoiser, checkpoint)  # before they are sharded
        with self.signals.installed():
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        if self.signals.received and self.args.should_save:
            self.notify(
                f"stopped at step {self.state.global_step}; {self.checkpoint_status}; run the same command to resume"
            )
        self.signals.raise_received()
        if self.guard.limit_reached:
            raise FloatingPointError(
                f"the loss or its gradients were not finite in {self.guard.in_a_row} steps in a row; these steps did "
                f"not change the weights; {self.checkpoint_status}; check the data, or try a lower learning rate in "
                "another folder"
            )
        return output

    @property
    def checkpoint_status(self) -> str:
        """A clause for messages that names the last checkpoint."""
        found = list_checkpoints(self.folder)
        return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint"

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.add_loss(loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # the parent class adds up losses, and NaN would spoil later sums

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.guard.set_grad_norm(None if self.args.fp16 else norm)  # with fp16 the gradient scaler skips overflows
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model in a folder. All processes must call this; the main process writes."""
        weights: Any = full_state_dict(self.denoiser, keep=self.args.should_save)
        if self.is_deepspeed_enabled:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        try:
            if self.args.should_save:
                save_denoiser(output_dir or self.folder, self.denoiser, self.processing_class, weights)
        except Exception as error:  # torch, safetensors and tokenizers each raise another class when the disk is full
            if not _internal_call:
                raise
            self._save_error = error  # raised later: all processes still have collectives to run

    def _get_output_dir(self, trial: Any) -> str:
        """The folder in which the parent class writes checkpoints: the staging folder."""
        return str(self.folder / STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint. Raises OSError only if saving fails and there is no earlier one to resume from."""
        checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if checkpoint == self._last_saved:
            return
        staged, self._save_error = self.folder / STAGING / checkpoint.name, None
        states: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:  # a checkpoint of an earlier version may not have them all
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, {})
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            self._save_error = error
        [failed] = all_reduce_max(self._save_error is not None)
        if self.args.should_save and not failed:
            try:
                commit_checkpoint(staged, checkpoint)
                rotate_checkpoints(str(self.folder), self.args.save_total_limit)
            except OSError as error:
                self._save_error = error
        [failed] = all_reduce_max(self._save_error is not None)
        if not failed:
            self._last_saved = checkpoint
            return
        if self.args.should_save:
            remove_partial_saves(self.folder)
        error, self._save_error = self._save_error, None
        reason = f"{checkpoint.name} could not be saved" + (f" ({error!r})" if error else "")
        [earlier] = all_reduce_max(len(list_checkpoints(self.folder)))
        if not earlier:
            message = f"{reason}, and there is no earlier one in {self.folder}; free some disk space, then try again"
            raise OSError(message) from error
        if self.args.should_save:
            self.notify(f"{reason}; {self.checkpoint_status}; training continues")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, scheduler = self._optimizer_and_scheduler
        keep = self.args.should_save
        state = full_optimizer_state_dict(optimizer, keep=keep) if self.is_fsdp_enabled else None
        if self._save_error is not None:
            raise self._save_error  # no collectives follow, so one process may stop here alone
        if state is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @property
    def _optimizer_and_scheduler(self) -> tuple[Any, Any]:
        return self.optimizer, self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            load_weights(self.denoiser, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            optimizer, scheduler = self._optimizer_and_scheduler
            load_full_optimizer_state(optimizer, Path(checkpoint) / OPTIMIZER_NAME)
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
