"""A `transformers.Trainer` that loses nothing: not to a signal, a full disk, a bad step or a damaged file."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from diffusify.models.denoiser import Denoiser
from diffusify.models.saving import load_weights, save_denoiser
from diffusify.training.resilience.checkpoints import DRAFTS, checkpoints, chosen, clear_drafts, publish
from diffusify.training.resilience.distributed import agreed
from diffusify.training.resilience.nonfinite import NonFiniteGuard
from diffusify.training.resilience.sharding import load_optimizer, whole_optimizer, whole_weights
from diffusify.training.resilience.signals import Signals


class ResilientTrainer(Trainer):
    """A trainer of denoisers whose checkpoints are whole or not there, on any number of processes.

    Checkpoints are checked before they are used, and do not depend on how many processes wrote them. One that does not
    fit on the disk is told of, and the next is tried. A step that is not finite is skipped; `max_skipped` in a row end
    the run. SIGINT, SIGTERM and SIGUSR1 end it after the step at hand, with a checkpoint, as KeyboardInterrupt or
    SystemExit. `tell` takes what a person should know.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        args: TrainingArguments,
        *,
        callbacks: list[TrainerCallback],
        max_skipped: int,
        tell: Callable[[str], None] | None,
        **kwargs: Any,
    ) -> None:
        args.logging_nan_inf_filter = False  # it would hide what the guard looks for, and ask in every micro-batch
        assert args.output_dir is not None, "TrainingArguments fills it in"
        self.denoiser, self.folder = denoiser, Path(args.output_dir)
        self.tell = tell or logging.getLogger(__name__).warning
        self.guard, self.signals = NonFiniteGuard(max_skipped), Signals(self.tell)
        super().__init__(model=denoiser, args=args, callbacks=[*callbacks, self.guard, self.signals], **kwargs)
        self._saved: Path | None = None
        self._fault: Exception | None = None
        self.guard.can_skip = not self.is_deepspeed_enabled
        if self.is_fsdp_enabled:
            plugin: Any = self.accelerator.state.fsdp_plugin
            if plugin.cpu_ram_efficient_loading:
                raise ValueError("fsdp_cpu_ram_efficient_loading must be false: every process loads the base by itself")
            layers: Any = denoiser.network._no_split_modules
            denoiser._no_split_modules = layers  # which accelerate asks for

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, perhaps from a checkpoint: a folder, or True for the newest that is whole.

        ValueError where it is damaged, or none is whole. FloatingPointError where steps ended up not finite.
        """
        start = None
        if resume_from_checkpoint:
            start = str(chosen(self.folder, resume_from_checkpoint, self.tell, first=self.args.should_save))
            self.args.eval_on_start = False  # its log has that already
            if self.is_fsdp_enabled:
                load_weights(self.denoiser, start)  # before they are shared out
        with self.signals.watched():
            output = super().train(start, trial, ignore_keys_for_eval)
        if self.signals.caught and self.args.should_save:
            self.tell(f"stopped at step {self.state.global_step}; {self.last}; the same command goes on from there")
        self.signals.leave()
        if self.guard.exhausted:
            raise FloatingPointError(
                f"the loss or its gradients were not finite in {self.guard.in_a_row} steps in a row, which changed "
                f"nothing; {self.last}; look at the data, or try a lower learning rate in another folder"
            )
        return output

    @property
    def last(self) -> str:
        """Where the last checkpoint stands, in words."""
        found = checkpoints(self.folder)
        return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint"

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.see_loss(loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # or no later loss could be added to it

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.guard.see_norm(None if self.args.fp16 else norm)  # its scaler looks for what overflows
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model into a folder: all processes take part, the first one writes."""
        weights: Any = whole_weights(self.denoiser, keep=self.args.should_save)
        if self.is_deepspeed_enabled:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        try:
            if self.args.should_save:
                save_denoiser(output_dir or self.folder, self.denoiser, self.processing_class, weights)
        except Exception as error:  # a full disk has many names: torch, safetensors and tokenizers each have their own
            if not _internal_call:
                raise
            self._fault = error  # of a checkpoint, which all processes have more to do for

    def _get_output_dir(self, trial: Any) -> str:
        """Where the parent class writes checkpoints: aside, until they are whole."""
        return str(self.folder / DRAFTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint. OSError only if it does not fit and is the first: else there is one to go on from."""
        whole = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if whole == self._saved:
            return
        draft, self._fault = self.folder / DRAFTS / whole.name, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            self._fault = error
        [failed] = agreed(self._fault is not None)
        if self.args.should_save and not failed:
            try:
                publish(draft, whole)
                rotate_checkpoints(str(self.folder), self.args.save_total_limit)
            except OSError as error:
                self._fault = error
        [failed] = agreed(self._fault is not None)
        if not failed:
            self._saved = whole
            return
        if self.args.should_save:
            clear_drafts(self.folder)
        fault, self._fault = self._fault, None
        why = f"{whole.name} could not be saved ({fault!r})" if fault else f"{whole.name} could not be saved"
        [older] = agreed(len(checkpoints(self.folder)))
        if not older:
            message = f"{why}, and there is none before it in {self.folder}; make room, then try again"
            raise OSError(message) from fault
        if self.args.should_save:
            self.tell(f"{why}; {self.last}; training goes on")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, scheduler = self._parts
        state = whole_optimizer(optimizer, keep=self.args.should_save) if self.is_fsdp_enabled else None
        if self._fault is not None:
            raise self._fault  # from here on each process is by itself
        if state is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @property
    def _parts(self) -> tuple[Any, Any]:
        return self.optimizer, self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            load_weights(self.denoiser, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            optimizer, scheduler = self._parts
            load_optimizer(optimizer, Path(checkpoint) / OPTIMIZER_NAME)
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
