"""A callback that skips optimizer steps whose loss or gradients are not finite."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from diffusify.training.resilience.distributed import all_reduce_max


class NonFiniteGuard(TrainerCallback, ExportableState):
    """Skips steps whose loss or gradient norm is not finite, and ends a run after `limit` of them in a row.

    All processes skip together. The accelerator is synchronized once per step. With `can_skip=False` (DeepSpeed, which
    updates the weights before a callback can run) the first such step ends the run without saving a checkpoint.
    """

    former_name = "Guard"  # in checkpoints of earlier versions

    def __init__(self, limit: int = 10, *, can_skip: bool = True) -> None:
        if limit < 1:
            raise ValueError(f"max_skipped={limit} must be at least 1: a run ends after that many steps in a row")
        self.limit, self.can_skip = limit, can_skip
        self.skipped = self.in_a_row = 0
        self._loss: Tensor | None = None
        self._norm: Tensor | float | None = None
        self.losses: list[Tensor] = []  # (loss, 1) of every step that was not skipped, for the trainer's log

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the step's loss."""
        self._loss = loss if self._loss is None else self._loss + loss

    def set_grad_norm(self, norm: Tensor | float | None) -> None:
        """Set the step's gradient norm; None if it is not known."""
        self._norm = norm

    @property
    def limit_reached(self) -> bool:
        """Whether the last `limit` steps were all skipped."""
        return self.in_a_row >= self.limit

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved: Any = state.stateful_callbacks or {}
        own = saved.get(type(self).__name__, saved.get(self.former_name))
        if isinstance(own, dict):
            self.skipped, self.in_a_row = own["attributes"]["skipped"], own["attributes"]["in_a_row"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        assert self._loss is not None, "the trainer adds every micro-batch's loss"
        checked = self._loss if self._norm is None else self._loss + self._norm
        if all_reduce_max(not checked.isfinite())[0]:
            optimizer.zero_grad()  # an optimizer ignores weights without gradients
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if not self.can_skip:
                raise FloatingPointError(
                    f"the loss or its gradients were not finite at step {state.global_step + 1}, and DeepSpeed has "
                    "already updated the weights with them; resume from the last checkpoint, which is not affected"
                )
        else:
            self.losses.append(torch.stack([self._loss, torch.ones_like(self._loss)]))
            self.in_a_row = 0
        self._loss = self._norm = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.limit_reached:
            control.should_save = control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped": self.skipped, "in_a_row": self.in_a_row}}
